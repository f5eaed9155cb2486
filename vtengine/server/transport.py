"""uvicorn's connections with two things more: the head of a reply goes out with what follows it, in one call of the
operating system, and a client that has stopped reading counts as gone.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEAD = b"HTTP/1.1 "  # neither JSON nor HTML nor the size of a chunk begins like this


STALL_S = 120.0
"""How long a client may take nothing of what is ready for it; the request's own time limit ends no such wait. What it
does take shows in steps of a megabyte or so, as the operating system's buffer empties: 10 KB/s are still enough."""


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's, over a transport that keeps heads back for a moment."""

    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_HeadWithBody(transport))  # type: ignore[arg-type]

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        self._look_away()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._look_away()
        super().connection_lost(exc)

    def _watch(self) -> None:
        self._stall = self.loop.call_later(STALL_S, self._mind, self.transport.get_write_buffer_size())

    def _mind(self, bytes_before: int) -> None:
        if self.transport.get_write_buffer_size() < bytes_before:
            self._watch()
        else:
            self.transport.abort()

    def _look_away(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


class _HeadWithBody:
    """A transport. A head waits until the next write, or until the event loop has done what is ready now."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(_HEAD):
            self._head = data
            asyncio.get_running_loop().call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head:
            data, self._head = self._head, b""
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
