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
from urllib.parse import urlsplit

LIMIT = 1 << 24


@dataclass
class Answered:
    """status; seconds to the first byte of the body and to the last; the bytes."""

    status: int
    first_s: float
    last_s: float
    body: bytes


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Answered:
    """One exchange over a kept connection."""
    began = time.perf_counter()
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    status = int(lines[0].split()[1])
    length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
    if length is not None:
        body = await reader.readexactly(length)
        first_s = time.perf_counter() - began
    else:
        body, first_s = b"", 0.0
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            first_s = first_s or time.perf_counter() - began
            await reader.readexactly(2)
        await reader.readexactly(2)
    return Answered(status, first_s, time.perf_counter() - began, body)


def framed(host: str, body: bytes) -> bytes:
    lines = ("POST /v1/chat/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode() + body


async def run(url: str, bodies: list[bytes], concurrency: int) -> dict[str, object]:
    """All requests, each connection taking the next one as it becomes free."""
    place = urlsplit(url)
    host, port = place.hostname or "", place.port or 80
    waiting = deque(enumerate(framed(place.netloc, body) for body in bodies))
    answers: list[Answered | None] = [None] * len(bodies)
    pairs = [await asyncio.open_connection(host, port, limit=LIMIT) for _ in range(min(concurrency, len(bodies)))]
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while waiting:
            index, request = waiting.popleft()
            answers[index] = await ask(reader, writer, request)

    wall, busy = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work(*pair) for pair in pairs))
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    for _, writer in pairs:
        writer.close()
    done = [answer for answer in answers if answer is not None]
    return {
        "wall_s": wall,
        "client_cpu_s": busy,
        "first_s": [answer.first_s for answer in done],
        "last_s": [answer.last_s for answer in done],
        "failed": [answer.body.decode("utf-8", "replace")[:300] for answer in done if answer.status != 200],
        "contents": [content(answer.body) for answer in done if answer.status == 200],
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
