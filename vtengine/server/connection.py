"""The client's end of one request: its body in bounded memory, whether it is still there, and the reply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.types import Receive, Send

from vtengine.server.errors import ApiError

T = TypeVar("T")
DISCARD_S = 5.0
"""How long a refused client may go on sending: one that is cut off would not read why."""


class ClientGone(Exception):
    """The client closed the connection; nobody reads a reply."""


async def read_body(receive: Receive, headers: dict[str, str], max_bytes: int, hold: Callable[[int], None]) -> bytes:
    """The whole body; `hold` is told of every byte before it is kept, and may refuse it.

    Raises ApiError 413 as soon as it is too large, 415 for another type than JSON; ClientGone.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "unsupported_media_type", "the content-type must be application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "unsupported_media_type", "the body must not be compressed")
    stated = headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        if len(body) + len(piece) > max_bytes:
            raise _too_large(max_bytes)
        hold(len(piece))
        body += piece
        if not message.get("more_body", False):
            return bytes(body)


async def discard_body(receive: Receive, max_bytes: int) -> None:
    """Reads on without keeping anything, as far as is reasonable."""
    try:
        async with asyncio.timeout(DISCARD_S):
            left = max_bytes
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))
    except TimeoutError:
        return


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves (ClientGone) and when the caller is."""
    here = asyncio.current_task()
    assert here is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        here.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if gone and here.uncancel() == 0:  # nobody else has cancelled it
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()


class Reply:
    """Sends one response. `started`: the status is on its way and cannot be changed any more. `ended`: all is sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._events = bytearray()
        self.started = self.ended = False

    async def whole(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = encode_json(body)
        more = {"content-length": str(len(data)), **(headers or {})}
        await self._start(status, {"content-type": "application/json", **more})
        await self._send({"type": "http.response.body", "body": data})
        self.ended = True

    def add_event(self, data: Any) -> None:
        """Keeps it for the next send_events: a call of the operating system costs more than an event."""
        self._events += b"data: " + encode_json(data) + b"\n\n"

    async def send_events(self, is_last: bool = False) -> None:
        """Sends what was added; the first time the status too, the last time the mark of the end. Nothing to send:
        a comment, which keeps proxies from closing a silent connection.
        """
        if not self.started:
            if not self._events and not is_last:
                return
            await self._start(
                200, {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
            )
        data = bytes(self._events) + (b"data: [DONE]\n\n" if is_last else b"")
        self._events.clear()
        await self._send({"type": "http.response.body", "body": data or b": keep-alive\n\n", "more_body": not is_last})
        self.ended = is_last

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.started = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


def encode_json(value: Any) -> bytes:
    """ASCII, so that no text of a model can break a line of an event stream. A figure that is no number is null."""
    return to_json(value, ensure_ascii=True, inf_nan_mode="null")


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, "body_too_large", f"the body is larger than {max_bytes} bytes")
