"""What gathers and what does not: property tests of the mailbox, and how many events a fast stream makes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.running import MODEL, Running, ask
from vtengine.rollout.episode import Asked, Replied, TextDelta
from vtengine.server.config import ServerLimits
from vtengine.server.mailbox import Mailbox, Told

Serve = Callable[..., Running]
ASKED, REPLIED = Asked(0, (), 1), Replied(0, cast("Any", None))
words = st.one_of(
    st.just(ASKED), st.just(REPLIED), st.text("ab", min_size=1, max_size=3).map(lambda t: TextDelta(0, t))
)


def flat(told: list[Told], index: int) -> list[object]:
    """The words of one choice, neighbouring texts joined."""
    result: list[object] = []
    for who, word in told:
        if who != index:
            continue
        if isinstance(word, TextDelta) and result and isinstance(result[-1], str):
            result[-1] += word.text
        else:
            result.append(word.text if isinstance(word, TextDelta) else word)
    return result


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), words), max_size=20), st.lists(st.booleans(), max_size=20))
def test_nothing_is_lost_and_nothing_overtakes(told: list[Told], takes: list[bool]) -> None:
    async def main() -> list[Told]:
        box, out = Mailbox(lambda: 0.0, 0.01), []
        for number, one in enumerate(told):
            box.put(one)
            if number < len(takes) and takes[number]:
                out += await box.take()
        return out + await box.take() + await box.take()

    got = asyncio.run(main())
    assert [flat(got, index) for index in range(3)] == [flat(told, index) for index in range(3)]


def test_the_first_text_of_a_turn_does_not_wait_and_later_text_does() -> None:
    async def main() -> None:
        box = Mailbox(lambda: 0.2, 1.0)
        for turn in range(2):
            box.put((0, Asked(turn, (), 1)))
            assert len(await box.take()) == 1
            began = time.perf_counter()
            box.put((0, TextDelta(turn, "a")))
            assert await box.take() == [(0, TextDelta(turn, "a"))] and time.perf_counter() - began < 0.15
            for _ in range(5):
                box.put((0, TextDelta(turn, "b")))
            assert await box.take() == [(0, TextDelta(turn, "bbbbb"))] and time.perf_counter() - began >= 0.2

    asyncio.run(main())


def test_silence() -> None:
    async def main() -> None:
        box = Mailbox(lambda: 9.0, 0.05)
        began = time.perf_counter()
        assert [await box.take() for _ in range(3)] == [[], [], []]
        assert time.perf_counter() - began >= 0.14
        box.put((0, REPLIED))
        assert await box.take() == [(0, REPLIED)]  # a silence hands over what waits
        box.close()

    asyncio.run(main())


def test_a_fast_stream_shares_events(serve: Serve) -> None:
    long = f"<think>{'x' * 400}</think><answer>ok</answer>"
    counts = []
    for rate in (1, 100_000):
        server = serve([long], slow=0.001, limits=ServerLimits(max_text_events_per_s=rate))
        messages: Any = ask()
        chunks = list(server.client().chat.completions.create(model=MODEL, messages=messages, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ok"
        counts.append(len(chunks))
    assert counts[0] <= 8 and counts[1] > 50
