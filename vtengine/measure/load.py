"""How questions come: so many at a time, or so many per second whatever the engine does with them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vtengine.rollout.group import in_order

Row = dict[str, Any]
Job = Callable[[], Awaitable[Row]]


@dataclass(frozen=True)
class Load:
    """concurrency: questions at a time, the next one as soon as one is done (a closed loop). rate_per_s: questions per
    second, at the random times of a Poisson process, whether the last ones are done or not (an open loop). One of both.
    """

    concurrency: int | None = None
    rate_per_s: float | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate_per_s is None):
            raise ValueError(f"load: concurrency {self.concurrency}, rate_per_s {self.rate_per_s}: give one of both")
        for name, value in (("concurrency", self.concurrency), ("rate_per_s", self.rate_per_s)):
            if value is not None and value <= 0:
                raise ValueError(f"load: {name} = {value}: must be > 0")

    def __str__(self) -> str:
        return f"{self.concurrency} at a time" if self.rate_per_s is None else f"{self.rate_per_s:g}/s"


@dataclass(frozen=True)
class Pass:
    """All questions once: the rows in their order, and seconds from the first one's coming to the last one's end."""

    rows: tuple[Row, ...]
    wall_s: float


async def run_load(load: Load, jobs: Sequence[Job], seed: int) -> Pass:
    """seed: of the times at which questions come, so that a round has the arrivals of the one before."""
    began = time.perf_counter()
    if load.concurrency is not None:
        rows = [row async for row in in_order(jobs, load.concurrency)]
    else:
        rows = await _arrive(jobs, _arrivals_s(load.rate_per_s or 0, len(jobs), seed))
    return Pass(tuple(rows), time.perf_counter() - began)


def _arrivals_s(rate_per_s: float, count: int, seed: int) -> list[float]:
    """Seconds from the start on; the first one comes at once."""
    draw, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(at)
        at += draw.expovariate(rate_per_s)
    return times


async def _arrive(jobs: Sequence[Job], arrivals_s: Sequence[float]) -> list[Row]:
    loop = asyncio.get_running_loop()
    began, tasks = loop.time(), []
    async with asyncio.TaskGroup() as group:
        for job, at in zip(jobs, arrivals_s, strict=True):
            await asyncio.sleep(began + at - loop.time())  # not a pause after the last one: lateness would add up
            tasks.append(group.create_task(_run(job)))
    return [task.result() for task in tasks]


async def _run(job: Job) -> Row:
    return await job()
