"""A load generator for a chat server: as many connections as are asked for, bodies made beforehand, one JSON line out.

    python benchmarks/load_client.py http://127.0.0.1:8000 REQUESTS.jsonl --concurrency 64

Standard library only and no model: it shares the machine with the server it measures, so it must cost next to nothing.
A line of REQUESTS.jsonl is the body of one request. It says `ready` once all connections stand, and begins at a line on
standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

END_OF_CHUNKS = b"\r\n0\r\n\r\n"
"""JSON keeps line ends out of its strings, so that a body cannot hold it."""


@dataclass
class Answered:
    """status; seconds to the first byte of the body and to the last; the body as it came, in chunks where it has no
    length."""

    status: int
    first_s: float
    last_s: float
    body: bytes
    is_chunked: bool

    def text(self) -> bytes:
        """The body itself."""
        if not self.is_chunked:
            return self.body
        text, rest = b"", self.body
        while True:
            size, _, rest = rest.partition(b"\r\n")
            if not int(size, 16):
                return text
            text, rest = text + rest[: int(size, 16)], rest[int(size, 16) + 2 :]


class Connection(asyncio.Protocol):
    """A kept connection, for one exchange at a time. While the clock runs it only keeps what comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    async def ask(self, request: bytes) -> Answered:
        self._answered: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._data, self._body, self._first_s = bytearray(), 0, 0.0
        self._began = time.perf_counter()
        self.transport.write(request)
        return await self._answered

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._body and not self._read_head():
            return
        size, length = len(self._data) - self._body, self._length
        if size and not self._first_s:
            self._first_s = time.perf_counter() - self._began
        if self._data.endswith(END_OF_CHUNKS, self._body) if length is None else size >= length:
            last_s, body = time.perf_counter() - self._began, bytes(self._data[self._body :])
            self._answered.set_result(Answered(self._status, self._first_s, last_s, body, length is None))

    def connection_lost(self, error: Exception | None) -> None:
        if hasattr(self, "_answered") and not self._answered.done():
            self._answered.set_exception(error or ConnectionError("the server closed the connection"))

    def _read_head(self) -> bool:
        """Once it is there: the status, where the body begins, and its length (None: it comes in chunks)."""
        head, blank, _ = self._data.partition(b"\r\n\r\n")
        if not blank:
            return False
        lines = bytes(head).lower().split(b"\r\n")
        self._status, self._body = int(lines[0].split()[1]), len(head) + len(blank)
        self._length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
        return True


def framed(host: str, body: bytes) -> bytes:
    lines = ("POST /v1/chat/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode() + body


async def run(url: str, bodies: list[bytes], concurrency: int) -> dict[str, object]:
    """All requests, each connection taking the next one as it becomes free."""
    place = urlsplit(url)
    host, port = place.hostname or "", place.port or 80
    waiting = deque(enumerate(framed(place.netloc, body) for body in bodies))
    answers: list[Answered | None] = [None] * len(bodies)
    loop = asyncio.get_running_loop()
    pairs = [await loop.create_connection(Connection, host, port) for _ in range(min(concurrency, len(bodies)))]
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)

    async def work(connection: Connection) -> None:
        while waiting:
            index, request = waiting.popleft()
            answers[index] = await connection.ask(request)

    wall, busy = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work(connection) for _, connection in pairs))
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    for transport, _ in pairs:
        transport.close()
    done = [answer for answer in answers if answer is not None]
    return {
        "wall_s": wall,
        "client_cpu_s": busy,
        "first_s": [answer.first_s for answer in done],
        "last_s": [answer.last_s for answer in done],
        "failed": [answer.text().decode("utf-8", "replace")[:300] for answer in done if answer.status != 200],
        "contents": [content(answer.text()) for answer in done if answer.status == 200],
    }


def content(body: bytes) -> str:
    """The answer of a whole reply or of an event stream."""
    if body.startswith(b"{"):
        return str(json.loads(body)["choices"][0]["message"]["content"])
    events = [json.loads(line[6:]) for line in body.split(b"\n\n") if line.startswith(b"data: {")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event.get("choices"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("requests", type=Path)
    parser.add_argument("--concurrency", type=int, default=64)
    args = parser.parse_args()
    bodies = args.requests.read_bytes().splitlines()
    print(json.dumps(asyncio.run(run(args.url, bodies, args.concurrency))), flush=True)


if __name__ == "__main__":
    main()
