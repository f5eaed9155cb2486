"""A load generator for a chat server: as many connections as are asked for, bodies made beforehand, one JSON line out.

    python benchmarks/load_client.py http://127.0.0.1:8000 REQUESTS.jsonl --concurrency 64

Standard library only and no model: it shares the machine with the server it measures, so it must cost next to nothing.
A line of REQUESTS.jsonl is the body of one request. It says `ready` once all connections stand, and begins at a line on
standard input.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
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


class Connection:
    """A kept connection, for one exchange at a time. While the clock runs it only keeps what comes."""

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port))

    def ask(self, request: bytes) -> None:
        """Blocks until the request is on its way."""
        self._data, self._body, self._first_s = bytearray(), 0, 0.0
        self._began = time.perf_counter()
        self.socket.sendall(request)

    def read(self) -> Answered | None:
        """What has come; the answer once it is whole. Raises ConnectionError when the server closes before that."""
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._data += data
        if not self._body and not self._read_head():
            return None
        size, length = len(self._data) - self._body, self._length
        if size and not self._first_s:
            self._first_s = time.perf_counter() - self._began
        if not (self._data.endswith(END_OF_CHUNKS, self._body) if length is None else size >= length):
            return None
        last_s, body = time.perf_counter() - self._began, bytes(self._data[self._body :])
        return Answered(self._status, self._first_s, last_s, body, length is None)

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


def run(url: str, bodies: list[bytes], concurrency: int) -> dict[str, object]:
    """All requests, each connection taking the next one as it becomes free."""
    place = urlsplit(url)
    waiting = deque(enumerate(framed(place.netloc, body) for body in bodies))
    answers: list[Answered | None] = [None] * len(bodies)
    connections = [Connection(place.hostname or "", place.port or 80) for _ in range(min(concurrency, len(bodies)))]
    print("ready", flush=True)
    sys.stdin.readline()
    wall, busy = time.perf_counter(), time.process_time()
    with selectors.DefaultSelector() as selector:
        asked: dict[Connection, int] = {}
        for connection in connections:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            asked[connection], request = waiting.popleft()
            connection.ask(request)
        while asked:
            for key, _ in selector.select():
                connection = key.data
                if (answer := connection.read()) is None:
                    continue
                answers[asked.pop(connection)] = answer
                if waiting:
                    asked[connection], request = waiting.popleft()
                    connection.ask(request)
                else:  # the server may close it for its idleness
                    selector.unregister(connection.socket)
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    for connection in connections:
        connection.socket.close()
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
    print(json.dumps(run(args.url, bodies, args.concurrency)), flush=True)


if __name__ == "__main__":
    main()
