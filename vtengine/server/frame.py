"""Around every request: an id, one line of log without anything of its contents, the counts by route and status."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vtengine.server.metrics import Metrics

log = logging.getLogger("vtengine.server.access")
CHAT = "/v1/chat/completions"
ROUTES = (CHAT, "/v1/models", "/health", "/ready", "/metrics", "/")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHOWN = 100  # characters of a path in the log


def request_id_of(scope: Scope) -> str:
    """The client's own id where it is harmless in headers and logs, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(given := value.decode("latin-1")):
            return given
    return f"req-{secrets.token_hex(12)}"


class Frame:
    """Stands outermost, and neither buffers nor hides a disconnect."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_s = time.perf_counter()
        scope["vtengine.request_id"] = request_id = request_id_of(scope)
        status = 0

        async def framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode("ascii"))]
            await send(message)

        try:
            await self.app(scope, receive, framed)
        finally:
            self._note(scope, scope.get("vtengine.status", status), time.perf_counter() - started_s)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        plain = path.rstrip("/") or "/"
        route = plain if plain in ROUTES else "/v1/models" if path.startswith("/v1/models/") else "other"
        self.metrics.note(route, status, seconds)
        shown = ascii(path)[1:-1][:_SHOWN]
        log.info("%s %s %s %d %.3fs", scope["vtengine.request_id"], scope["method"], shown, status, seconds)
