"""When events go out: the first text at once, news of a turn with it, a silence broken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from tests.server.running import Running
from tests.server.test_connections import read_all, send_chat
from vtengine.server import bell as bell_module
from vtengine.server.bell import SOON_S, Bell

Serve = Callable[..., Running]


def seconds_of(begin: Callable[[Bell], None], silence_s: float = 9.0) -> float:
    """How long the one who waits sleeps on."""

    async def main() -> float:
        bell = Bell(silence_s)
        began = time.perf_counter()
        begin(bell)
        await asyncio.wait_for(bell.wait(), 60)
        bell.close()
        return time.perf_counter() - began

    return asyncio.run(main())


def test_it_wakes_at_once_or_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seconds_of(Bell.ring_soon) >= SOON_S
    monkeypatch.setattr(bell_module, "SOON_S", 60)
    for both in ((Bell.ring, Bell.ring_soon), (Bell.ring_soon, Bell.ring), (Bell.ring,)):
        assert seconds_of(lambda bell, both=both: [ring(bell) for ring in both], silence_s=90) < 30  # type: ignore[misc]


def test_what_went_out_already_does_not_ring_again() -> None:
    async def main() -> None:
        bell = Bell(9.0)
        bell.ring_soon()
        bell.ring()
        await bell.wait()
        waiting = asyncio.ensure_future(bell.wait())
        assert not (await asyncio.wait([waiting], timeout=1.5 * SOON_S))[0]
        bell.ring_soon()
        await asyncio.wait_for(waiting, 60)
        bell.close()

    asyncio.run(main())


def test_what_is_ready_when_it_rings_is_there_when_it_is_heard() -> None:
    """An engine hands over last tokens and end in one go; the task that waits for the end runs a moment later."""

    async def main() -> None:
        bell, told, end = Bell(9.0), [], asyncio.get_running_loop().create_future()

        async def episode() -> None:
            await end
            told.append("end")
            bell.ring()

        running = asyncio.ensure_future(episode())
        await asyncio.sleep(0)
        told.append("last text")
        bell.ring()
        end.set_result(None)
        await bell.wait()
        assert told == ["last text", "end"]
        await running
        bell.close()

    asyncio.run(main())


def test_silence() -> None:
    async def main() -> None:
        bell = Bell(0.05)
        began = time.perf_counter()
        for _ in range(3):
            await asyncio.wait_for(bell.wait(), 60)
        assert time.perf_counter() - began >= 0.14
        bell.close()
        waiting = asyncio.ensure_future(bell.wait())
        assert not (await asyncio.wait([waiting], timeout=0.2))[0]
        waiting.cancel()

    asyncio.run(main())


def pieces_of(body: bytes) -> list[bytes]:
    """The parts of a chunked body, as they were sent."""
    pieces = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        pieces.append(rest[: int(size, 16)])
        body = rest[int(size, 16) + 2 :]
    return pieces


def test_news_of_a_turn_go_with_its_text(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bell_module, "SOON_S", 60)
    raw = read_all(send_chat(serve(slow=0.01), stream=True))
    pieces = pieces_of(raw.partition(b"\r\n\r\n")[2])
    assert b'"turn_started","turn":1' in pieces[0] and b'"reasoning_content":"t"' in pieces[0]
    second = next(piece for piece in pieces if b'"turn_started","turn":2' in piece)
    assert b'"reasoning_content"' in second
    assert b'"turn_finished","turn":2' in pieces[-2] and b"data: [DONE]" in pieces[-2] and pieces[-1] == b""


def test_the_status_does_not_wait_for_the_first_token(serve: Serve) -> None:
    server = serve(held=True)
    connection = send_chat(server, stream=True)
    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    server.backend.released.set()  # type: ignore[attr-defined]
    assert b"data: [DONE]" in read_all(connection)
