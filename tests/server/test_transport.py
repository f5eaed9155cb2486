"""Heads of replies go out with what follows them, and are never lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.server.running import ANSWER, Running
from tests.server.test_connections import send_chat
from vtengine.server.transport import _HeadWithBody

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


def test_a_reply_arrives_in_one_piece(serve: Callable[..., Running]) -> None:
    """uvicorn alone writes its head first, and wakes the client for it."""
    piece = send_chat(serve([ANSWER])).recv(1 << 16)
    assert piece.startswith(HEAD[:15]) and piece.endswith(b"}")
