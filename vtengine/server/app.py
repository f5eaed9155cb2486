"""The application: routes, errors in OpenAI's shape, the page."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from vtengine.rollout.group import Setting
from vtengine.server.admission import Gate
from vtengine.server.chat import ChatExchange
from vtengine.server.config import ServerLimits
from vtengine.server.errors import BROKEN, ApiError
from vtengine.server.frame import Frame
from vtengine.server.house import House
from vtengine.server.keys import ApiKeys
from vtengine.server.metrics import CONTENT_TYPE, Metrics
from vtengine.server.page import load_page

log = logging.getLogger(__name__)
_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_house(
    setting: Setting, model: str, limits: ServerLimits | None = None, keys: ApiKeys | None = None
) -> House:
    limits = limits or ServerLimits()
    gate = Gate(limits)
    sources: dict[str, Callable[[], Mapping[str, float]]] = {"engine": setting.backend.stats}
    pipeline_stats = getattr(setting.pipeline, "stats", None)
    if pipeline_stats is not None:
        sources["images"] = pipeline_stats
    return House(setting, limits, model, keys or ApiKeys(), gate, Metrics(gate, sources), int(time.time()))


def create_app(house: House) -> FastAPI:
    """The ASGI application. The setting's backend and pipeline stay the caller's, who closes them afterwards."""
    app = FastAPI(title="vtengine", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Frame, metrics=house.metrics)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_fault)
    _add_models(app, house)
    _add_state(app, house)
    page = load_page()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return ChatExchange(house, request.scope["vtengine.request_id"])

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page.html, headers=page.headers)

    return app


def _add_models(app: FastAPI, house: House) -> None:
    card = {"id": house.model, "object": "model", "created": house.created_s, "owned_by": "vtengine"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        house.keys.check(request.headers.get("authorization"))
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> dict[str, Any]:
        house.keys.check(request.headers.get("authorization"))
        if model != house.model:
            raise ApiError(404, "model_not_found", f"the model {ascii(model)[:100]} does not exist", param="model")
        return card


def _add_state(app: FastAPI, house: House) -> None:
    """Open to everybody: they tell nothing of requests."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        """Whether new requests are welcome; a full queue is ready still, as it empties by itself."""
        draining = house.gate.draining
        return JSONResponse({"status": "draining" if draining else "ready"}, 503 if draining else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(house.metrics.render(), media_type=CONTENT_TYPE)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = ascii(request.url.path)[1:-1][:100]
    message = {404: f"no such path: {path}", 405: f"{request.method} is not possible on {path}"}
    text = message.get(error.status_code, str(error.detail))
    refused = ApiError(error.status_code, _CODES.get(error.status_code, "invalid_request"), text)
    return JSONResponse(refused.body(), error.status_code, dict(error.headers or {}))


async def _answer_fault(request: Request, error: Exception) -> Response:
    log.error("request %s: unforeseen fault", request.scope.get("vtengine.request_id"), exc_info=error)
    return JSONResponse(ApiError(500, "internal_error", "an internal error", kind=BROKEN).body(), 500)
