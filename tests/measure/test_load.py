"""When questions come: so many at a time, or at random times whatever the engine does."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time

import pytest

from vtengine.measure.load import Load, Pass, _arrivals_s, run_load


def measure(load: Load, seconds: list[float]) -> tuple[Pass, list[float], int]:
    """Jobs that take so long; when each one began, and how many ran at a time at most."""
    began: list[float] = []
    running = itertools.count()
    most = now = 0

    async def job(index: int) -> dict[str, float]:
        nonlocal most, now
        began.append(asyncio.get_running_loop().time())
        next(running)
        now += 1
        most = max(most, now)
        await asyncio.sleep(seconds[index])
        now -= 1
        return {"index": index, "latency_s": seconds[index]}

    jobs = [lambda index=index: job(index) for index in range(len(seconds))]  # type: ignore[misc]
    done = asyncio.run(run_load(load, jobs, seed=3))
    return done, [at - began[0] for at in began], most


@pytest.mark.parametrize("load", [Load(concurrency=3), Load(rate_per_s=500.0)])
def test_rows_come_in_their_order(load: Load) -> None:
    done, _, _ = measure(load, [0.02, 0.0, 0.01, 0.0, 0.005])
    assert [row["index"] for row in done.rows] == [0, 1, 2, 3, 4]
    assert done.wall_s >= 0.02


def test_a_closed_loop_never_has_more_than_it_says() -> None:
    _, _, most = measure(Load(concurrency=3), [0.003] * 12)
    assert most == 3


def test_a_question_that_takes_long_holds_up_no_other() -> None:
    """While the first one runs, one worker takes all the others, however many."""
    done, began, _ = measure(Load(concurrency=2), [0.5] + [0.0] * 100)
    assert max(began) < 0.4 and done.wall_s >= 0.5


def test_a_question_that_is_taken_up_late_has_waited() -> None:
    """The machine stands still for 0.3 s while the others are due."""

    async def job(index: int) -> dict[str, float]:
        if index == 0:
            time.sleep(0.3)
        return {"latency_s": 0.0}

    jobs = [lambda index=index: job(index) for index in range(20)]  # type: ignore[misc]
    done = asyncio.run(run_load(Load(rate_per_s=200.0), jobs, seed=0))
    waited = sorted(row["latency_s"] for row in done.rows)
    assert waited[10] > 0.2, "due in the first 0.1 s, all but the first one"


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """All eight have come long before the first one is done."""
    _, began, most = measure(Load(rate_per_s=1000.0), [0.5] * 8)
    assert most == 8
    assert began == sorted(began)


def test_arrivals_are_a_poisson_process_with_the_seed() -> None:
    times = _arrivals_s(4.0, 4000, seed=1)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 0 and min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(1 / 4, rel=0.01)
    assert statistics.stdev(gaps) == pytest.approx(1 / 4, rel=0.1), "the gaps of a Poisson process spread as their mean"
    for count in (1, 2, 20):  # few questions come at the rate too
        few = _arrivals_s(4.0, count, seed=0)
        assert len(few) == count and few[0] == 0 and few[-1] == pytest.approx((count - 1) / 4)
    assert _arrivals_s(4.0, 4000, seed=1) == times != _arrivals_s(4.0, 4000, seed=2)


@pytest.mark.parametrize("load", [Load(concurrency=2), Load(rate_per_s=1000.0)])
def test_a_job_that_raises_ends_the_others(load: Load) -> None:
    ended: list[str] = []

    async def waits() -> dict[str, int]:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append("cancelled")
        return {}

    async def raises() -> dict[str, int]:
        await asyncio.sleep(0.02)
        raise RuntimeError("out of order")

    with pytest.raises(ExceptionGroup):
        asyncio.run(run_load(load, [raises, waits], seed=0))
    assert ended == ["cancelled"]


@pytest.mark.parametrize(
    "values", [{}, {"concurrency": 1, "rate_per_s": 1.0}, {"concurrency": 0}, {"rate_per_s": -1.0}]
)
def test_a_load_is_one_of_both(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="load: "):
        Load(**values)  # type: ignore[arg-type]
