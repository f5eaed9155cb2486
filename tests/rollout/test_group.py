"""Many episodes: order, bounds, seeds, cancellation."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtengine.engine.base import SamplingParams
from vtengine.engine.scripted import ScriptedBackend
from vtengine.protocol.conversation import Limits
from vtengine.protocol.profile import load_profile
from vtengine.rollout.group import WAITING_PER_RUNNING, Setting, in_order, run_batch
from vtengine.rollout.question import Question
from vtengine.rollout.tokenizer import Tokenizer

GLANCE = load_profile("glance")
ANSWER = GLANCE.reply_answer("clear", "5")


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 8))
def test_results_keep_their_order(delays: list[int], concurrency: int) -> None:
    running, most = 0, 0

    async def work(index: int, delay: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(delay):
            await asyncio.sleep(0)
        running -= 1
        return index

    def job(index: int, delay: int) -> Callable[[], Awaitable[int]]:
        return lambda: work(index, delay)

    async def main() -> list[int]:
        return [x async for x in in_order((job(i, d) for i, d in enumerate(delays)), concurrency)]

    assert asyncio.run(main()) == list(range(len(delays)))
    assert most <= concurrency


def test_a_slow_first_job_bounds_what_is_read_ahead() -> None:
    read = 0

    async def main() -> None:
        gate = asyncio.Event()

        async def work(index: int) -> int:
            if index == 0:
                await gate.wait()
            return index

        def jobs() -> Iterator[Callable[[], Awaitable[int]]]:
            nonlocal read
            for index in range(1000):
                read += 1
                yield lambda index=index: work(index)

        results = in_order(jobs(), 2)
        first = asyncio.ensure_future(anext(results))
        for _ in range(200):
            await asyncio.sleep(0)
        assert read == 2 * (1 + WAITING_PER_RUNNING)
        gate.set()
        assert await first == 0
        await results.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_a_job_is_read_when_it_can_run() -> None:
    """Rows may hold pictures: those that only wait for their turn stay in the file, and the first ones go ahead."""
    done: list[int] = []
    read_when_done: list[int] = []

    async def work(index: int) -> int:
        done.append(index)
        return index

    def jobs() -> Iterator[Callable[[], Awaitable[int]]]:
        for index in range(50):
            read_when_done.append(len(done))
            yield lambda index=index: work(index)

    async def main() -> list[int]:
        return [index async for index in in_order(jobs(), 8)]

    assert asyncio.run(main()) == list(range(50))
    assert all(index - finished <= 8 for index, finished in enumerate(read_when_done))
    assert read_when_done[7] > 0


def test_jobs_start_while_the_results_are_not_taken() -> None:
    done: list[int] = []

    async def work(index: int) -> int:
        done.append(index)
        return index

    async def main() -> None:
        results = in_order((lambda i=i: work(i) for i in range(100)), 2)
        assert await anext(results) == 0
        for _ in range(200):
            await asyncio.sleep(0)
        assert len(done) == 1 + 2 * (1 + WAITING_PER_RUNNING)
        await results.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_a_fault_of_what_gives_the_jobs_comes_after_the_results_before_it() -> None:
    async def work(index: int) -> int:
        await asyncio.sleep(0.01)
        return index

    def jobs() -> Iterator[Callable[[], Awaitable[int]]]:
        yield from (lambda i=i: work(i) for i in range(3))
        raise OSError("the disk is gone")

    async def main() -> None:
        seen = []
        with pytest.raises(OSError, match="the disk is gone"):
            async for index in in_order(jobs(), 2):
                seen.append(index)
        assert seen == [0, 1, 2]

    asyncio.run(main())


@pytest.mark.parametrize("how", ["close", "raise", "cancel"])
def test_what_still_runs_is_cancelled(how: str) -> None:
    cancelled: list[int] = []

    async def work(index: int) -> int:
        if index == 0:
            await asyncio.sleep(0.01)  # until the others run
            if how == "raise":
                raise RuntimeError("planned")
            return 0
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(index)
            raise
        return index

    async def main() -> None:
        results = in_order((lambda i=i: work(i) for i in range(4)), 4)
        if how == "raise":
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="planned"):
                await anext(results)
            return
        assert await anext(results) == 0
        if how == "close":
            await results.aclose()  # type: ignore[attr-defined]
        else:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await anext(results)

    asyncio.run(main())
    assert sorted(cancelled) == [1, 2, 3]


def test_a_second_fault_is_not_reported_as_one_that_nobody_saw() -> None:
    reports: list[str] = []

    async def work(index: int) -> int:
        await asyncio.sleep(0.01 if index == 0 else 0)
        raise RuntimeError(f"job {index}")

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context["message"]))
        with pytest.raises(RuntimeError, match="job 0"):
            async for _ in in_order((lambda i=i: work(i) for i in range(8)), 4):
                pass
        gc.collect()

    asyncio.run(main())
    assert not reports


def test_concurrency_is_checked() -> None:
    async def main() -> None:
        async for _ in in_order([], 0):
            pass

    with pytest.raises(ValueError, match="concurrency = 0"):
        asyncio.run(main())


def setting(tokenizer: Tokenizer, pipeline: Any, **sampling: Any) -> Setting:
    rng = random.Random(0)

    class Uneven(ScriptedBackend):
        async def generate(self, request: Any, on_tokens: Any = None) -> Any:
            for _ in range(rng.randrange(5)):
                await asyncio.sleep(0)
            return await super().generate(request)

    backend = Uneven(tokenizer, lambda request: ANSWER)
    return Setting(backend, pipeline, tokenizer, GLANCE, Limits(), SamplingParams(**sampling))


def test_siblings_have_seeds_of_their_own(small_tokenizer: Tokenizer, pipeline: Any) -> None:
    shared = setting(small_tokenizer, pipeline, seed=5, temperature=1.0)

    async def siblings() -> list[int]:
        return [sample.index async for sample in run_batch(shared, [Question("q", "56x56", "?")], n=16, concurrency=4)]

    assert asyncio.run(siblings()) == list(range(16))
    assert len({request.sampling.seed for request in shared.backend.requests}) == 16  # type: ignore[attr-defined]


def test_a_sample_has_the_same_seed_alone_and_in_a_batch(small_tokenizer: Tokenizer, pipeline: Any) -> None:
    questions = [Question(index, "56x56", f"number {index}?") for index in range(12)]

    def seeds(chosen: list[Question]) -> dict[tuple[int, ...], int | None]:
        shared = setting(small_tokenizer, pipeline, seed=5)

        async def main() -> list[tuple[object, int]]:
            return [(s.question.id, s.index) async for s in run_batch(shared, chosen, n=2, concurrency=3)]

        assert asyncio.run(main()) == [(question.id, index) for question in chosen for index in range(2)]
        requests = shared.backend.requests  # type: ignore[attr-defined]
        found: dict[Any, Any] = {}
        for request in requests:
            found.setdefault(request.token_ids, set()).add(request.sampling.seed)
        return found

    whole, part = seeds(questions), seeds(questions[7:9])
    assert all(whole[key] == part[key] for key in part) and len(part) == 2
    assert all(len(pair) == 2 for pair in whole.values())  # type: ignore[arg-type]
