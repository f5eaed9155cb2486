"""HTTP/1.1 as a load generator needs it: many streams at a time for next to no processor time, since the client's time
is in every figure, and most of all where both share a machine."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
CONNECT_S = 10.0
IDLE_S = 2.0
"""A connection that nobody used for so long is not used again: servers close theirs after 5 s, some just then."""
PIECE_BYTES = 1 << 16


class HttpFault(Exception):
    """The connection, or what the server says on it, is of no use."""


@dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used_s: float = 0.0

    @property
    def is_usable(self) -> bool:
        gone = self.reader.at_eof() or self.writer.is_closing()
        return not gone and time.monotonic() - self.used_s < IDLE_S


class HttpClient:
    """url: what every path begins with. Connections are kept for the next request, without a limit. For one event loop.

    Raises ValueError for an address, or a key, that cannot be one.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        place = urlsplit(url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise ValueError("is no http:// or https:// address")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("the API key has characters that no header may have; is there a line end in it?")
        self._tls = ssl.create_default_context() if place.scheme == "https" else None
        self._host, self._port = place.hostname, place.port or (443 if self._tls else 80)
        self._path = place.path.rstrip("/")
        lines = [f"Host: {place.netloc.rpartition('@')[2]}", "User-Agent: vtengine", "Accept-Encoding: identity"]
        lines += [f"Authorization: Bearer {api_key}"] if api_key else []
        self._headers = "\r\n".join(lines)
        self._free: list[_Connection] = []

    @asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Response]:
        """Where the body was read to its end, the connection is kept. Raises HttpFault, and so do the body's pieces."""
        connection, response = await self._connection(), None
        try:
            kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
            head = f"{method} {self._path}/{path} HTTP/1.1\r\n{self._headers}\r\n{kind}\r\n"
            connection.writer.write(head.encode("latin-1"))
            connection.writer.write(body)
            del body  # thousands may wait for their answers, with a picture each
            response = Response(connection.reader, *await _told(_read_head(connection.reader)))
            yield response
        finally:
            connection.used_s = time.monotonic()
            if response is not None and response.leaves_connection:
                self._free.append(connection)
            else:
                connection.writer.close()

    def close(self) -> None:
        for connection in self._free:
            connection.writer.close()

    async def _connection(self) -> _Connection:
        while self._free:
            connection = self._free.pop()
            if connection.is_usable:
                return connection
            connection.writer.close()
        opening = asyncio.open_connection(self._host, self._port, ssl=self._tls)
        return _Connection(*await _told(asyncio.wait_for(opening, CONNECT_S)))


class Response:
    """status; leaves_connection: the body was read to its end, and the server goes on listening."""

    def __init__(self, reader: asyncio.StreamReader, status: int, headers: dict[str, str]) -> None:
        self.status, self.leaves_connection = status, False
        self._reader, self._headers = reader, headers

    async def pieces(self) -> AsyncIterator[bytes]:
        """Of the body, as they come. Raises HttpFault where it breaks off."""
        if self._headers.get("content-encoding", "identity") != "identity":
            raise HttpFault(
                f"the reply is packed ({self._headers['content-encoding']}), although nobody asked for that"
            )
        if "chunked" in self._headers.get("transfer-encoding", ""):
            while size := await _told(_read_chunk_size(self._reader)):
                yield (await _told(self._reader.readexactly(size + 2)))[:-2]
            while await _told(self._reader.readline()) not in (b"\r\n", b"\n", b""):
                pass  # trailers
        elif "content-length" in self._headers:
            left = int(self._headers["content-length"])
            while left:
                piece = await _told(self._reader.read(min(left, PIECE_BYTES)))
                if not piece:
                    raise HttpFault("the connection was closed in the middle of the reply")
                left -= len(piece)
                yield piece
        else:
            while piece := await _told(self._reader.read(PIECE_BYTES)):
                yield piece
            return
        self.leaves_connection = self._headers.get("connection", "").lower() != "close"

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, names in lower case; an interim reply is passed over."""
    status = 0
    while status < 200:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(first.split()[1])
    headers = {} if first.startswith("HTTP/1.1") else {"connection": "close"}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    int(headers.get("content-length", 0))  # raises here rather than in the body
    return status, headers


async def _read_chunk_size(reader: asyncio.StreamReader) -> int:
    line = await reader.readline()
    if not line:
        raise asyncio.IncompleteReadError(line, 1)
    return int(line.partition(b";")[0], 16)


async def _told(what: Awaitable[T]) -> T:
    """Raises HttpFault for everything that a connection can do to its reader."""
    try:
        return await what
    except asyncio.IncompleteReadError as error:
        where = "in the middle of the reply" if error.expected else "before the reply came"
        raise HttpFault(f"the connection was closed {where}") from None
    except (TimeoutError, ssl.SSLError, OSError) as error:
        raise HttpFault(f"{type(error).__name__}: {error}" if str(error) else "no connection in time") from None
    except (ValueError, IndexError, asyncio.LimitOverrunError) as error:
        raise HttpFault(f"the reply is no HTTP/1.1: {error}") from None
