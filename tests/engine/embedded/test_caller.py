"""What a caller is told, in whatever steps tokens come, are paced and are delivered, and when it leaves."""

from __future__ import annotations

import asyncio
from itertools import chain
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from vtengine.engine.embedded.caller import Caller, Outbox

steps = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=20)
"""Of each token: whether the pace is due, whether the outbox is delivered after it."""


def ids(told: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(told))


@given(steps, st.integers(0, 20), st.booleans())
def test_every_token_once_in_order_and_none_after_it_left(
    tokens: list[tuple[bool, bool]], leaves: int, fails: bool
) -> None:
    async def play() -> None:
        outbox, pace, told = Outbox(), SimpleNamespace(is_due=False), cast("list[list[int]]", [])
        caller = Caller(outbox, cast("Any", pace), cast("Any", told.append))
        known: list[int] | None = None
        for token_id, (pace.is_due, is_delivered) in enumerate(tokens):
            caller.sampled(token_id)
            if is_delivered:
                outbox.deliver()
                await asyncio.sleep(0)
                if known is None and pace.is_due:
                    assert ids(told) == list(range(token_id + 1))
            if token_id == leaves:
                caller.completion.cancel()
                known = ids(told)
        caller.failed(KeyError("the engine broke")) if fails else caller.finished(cast("Any", "done"))
        outbox.deliver()
        await asyncio.sleep(0)
        assert all(told), "no empty call"
        if known is not None:
            assert caller.completion.cancelled() and ids(told) == known
        elif fails:
            assert isinstance(caller.completion.exception(), KeyError)
            assert ids(told) == list(range(len(ids(told))))
        else:
            assert caller.completion.result() == cast("Any", "done") and ids(told) == list(range(len(tokens)))

    asyncio.run(play())


def test_one_wake_up_for_all_of_a_loop_and_none_for_a_loop_that_is_gone() -> None:
    gone = asyncio.new_event_loop()
    gone.close()

    async def play() -> list[int]:
        outbox, done = Outbox(), cast("list[int]", [])
        outbox.add(gone, lambda: done.append(-1))
        loop = asyncio.get_running_loop()
        for number in range(3):
            outbox.add(loop, lambda number=number: done.append(number))  # type: ignore[misc]
        outbox.deliver()
        outbox.deliver()
        await asyncio.sleep(0)
        return done

    assert asyncio.run(play()) == [0, 1, 2]
