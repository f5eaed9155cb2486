"""The application: routes, errors in OpenAI's shape, the page."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from vtengine.rollout.group import Setting
from vtengine.server.admission import Gate
from vtengine.server.chat import ChatExchange
from vtengine.server.config import ServerLimits
from vtengine.server.errors import BROKEN, ApiError
from vtengine.server.frame import CHAT, Frame
from vtengine.server.house import House
from vtengine.server.keys import ApiKeys
from vtengine.server.metrics import CONTENT_TYPE, Metrics
from vtengine.server.page import load_page

log = logging.getLogger(__name__)
NO_ENGINE = {"status": "the engine is lost"}, 503
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


def create_app(house: House) -> ASGIApp:
    """The ASGI application. The setting's backend and pipeline stay the caller's, who closes them afterwards."""
    page = load_page()

    async def index(request: Request) -> Response:
        return HTMLResponse(page.html, headers=page.headers)

    others = Starlette(
        routes=[*_models(house), *_state(house), Route("/", index)],
        exception_handlers={ApiError: _answer_error, HTTPException: _answer_http_error, Exception: _answer_fault},
    )
    return Frame(_ChatOr(others, house), house.metrics)


class _ChatOr:
    """Nothing stands between a chat request and its exchange: each event of a stream would pay for it."""

    def __init__(self, others: ASGIApp, house: House) -> None:
        self.others, self.house = others, house

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/") == CHAT:
            await ChatExchange(self.house, scope, receive, send).run()
        else:
            await self.others(scope, receive, send)


def _models(house: House) -> list[Route]:
    card = {"id": house.model, "object": "model", "created": house.created_s, "owned_by": "vtengine"}

    async def models(request: Request) -> Response:
        house.keys.check(request.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        house.keys.check(request.headers.get("authorization"))
        name = request.path_params["model"]
        if name != house.model:
            raise ApiError(404, "model_not_found", f"the model {ascii(name)[:100]} does not exist", param="model")
        return JSONResponse(card)

    return [Route("/v1/models", models), Route("/v1/models/{model:path}", model)]


def _state(house: House) -> list[Route]:
    """Open to everybody: they tell nothing of requests."""

    async def health(request: Request) -> Response:
        """Whether it is worth keeping: without an engine it is not, another process may have one."""
        return JSONResponse({"status": "ok"}) if house.has_engine else JSONResponse(*NO_ENGINE)

    async def ready(request: Request) -> Response:
        """Whether new requests are welcome; a full queue is ready still, as it empties by itself."""
        if not house.has_engine:
            return JSONResponse(*NO_ENGINE)
        draining = house.gate.draining
        return JSONResponse({"status": "draining" if draining else "ready"}, 503 if draining else 200)

    async def metrics(request: Request) -> Response:
        return Response(house.metrics.render(), media_type=CONTENT_TYPE)

    return [Route("/health", health), Route("/ready", ready), Route("/metrics", metrics)]


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
