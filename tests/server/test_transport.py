"""Heads of replies go out with what follows them, and are never lost."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.server.running import ANSWER, MODEL, Running, ask, wait_for
from tests.server.test_connections import head, send_chat
from vtengine.server import transport
from vtengine.server.config import ServerLimits
from vtengine.server.transport import _HeadWithBody

Serve = Callable[..., Running]
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Recorder:
    """A transport that keeps what is done to it."""

    def __init__(self) -> None:
        self.done: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.done.append(data)

    def close(self) -> None:
        self.done.append(b"closed")


def written(act: Callable[[Any], None]) -> list[bytes]:
    """What reaches the transport, with a mark where the event loop went on."""

    async def main() -> list[bytes]:
        recorder = Recorder()
        act(_HeadWithBody(recorder))  # type: ignore[arg-type]
        recorder.done.append(b"later")
        await asyncio.sleep(0)
        return recorder.done

    return asyncio.run(main())


def test_head_and_body_are_one_write() -> None:
    assert written(lambda out: [out.write(HEAD), out.write(b"one"), out.write(b"two")]) == [  # type: ignore[misc]
        HEAD + b"one",
        b"two",
        b"later",
    ]


def test_a_head_without_a_body_goes_out_by_itself() -> None:
    assert written(lambda out: out.write(HEAD)) == [b"later", HEAD]
    assert written(lambda out: [out.write(HEAD), out.close()]) == [HEAD, b"closed", b"later"]  # type: ignore[misc]


def ask_for_much(server: Running, room: int) -> socket.socket:
    """A stream of some megabytes, whose client has read its first bytes. room: bytes of the client's own buffer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    host, port = server.url.removeprefix("http://").split(":")
    connection.settimeout(20)
    connection.connect((host, int(port)))
    body = json.dumps({"model": MODEL, "messages": ask(), "stream": True, "n": 48}).encode()
    connection.sendall(head(len(body)) + body)
    assert connection.recv(15) == HEAD[:15]
    return connection


LONG = f"<answer>{'a' * 490}</answer>"


def test_a_client_that_has_stopped_reading_counts_as_gone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "STALL_S", 0.3)
    server = serve(lambda _: LONG, limits=ServerLimits(max_choices=48, max_running=48), slow=0.002)
    with ask_for_much(server, 1 << 10):
        wait_for(lambda: bool(server.server.server_state.tasks))
        wait_for(lambda: not server.server.server_state.tasks and not server.server.server_state.connections)
    assert server.house.gate.inside == server.house.gate.running_now == 0
    assert server.metrics()['vtengine_requests_total{route="/v1/chat/completions",status="499"}'] == 1


def test_a_client_that_reads_slowly_is_served(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "STALL_S", 2)
    server = serve(lambda _: LONG, limits=ServerLimits(max_choices=48, max_running=48), slow=0.002)
    begun_s, end = time.monotonic(), b""
    with ask_for_much(server, 1 << 17) as connection:
        while piece := connection.recv(1 << 16):
            end = (end + piece)[-64:]
            time.sleep(0.05)
    assert time.monotonic() - begun_s > transport.STALL_S
    assert b"data: [DONE]" in end


def test_a_reply_arrives_in_one_piece(serve: Serve) -> None:
    """uvicorn alone writes its head first, and wakes the client for it."""
    piece = send_chat(serve([ANSWER])).recv(1 << 16)
    assert piece.startswith(HEAD[:15]) and piece.endswith(b"}")
