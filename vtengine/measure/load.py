"""How questions come: so many at a time, or so many per second whatever the engine does with them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Job = Callable[[], Awaitable[Row]]
"""Asks a question; the row says in `latency_s` how long it took."""


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
    """seed: of the times at which questions come, so that a round has the arrivals of the one before.

    A job that raises ends the others.
    """
    began = time.perf_counter()
    rows: list[Row] = [{}] * len(jobs)
    async with asyncio.TaskGroup() as group:
        if load.rate_per_s is None:
            waiting = iter(enumerate(jobs))
            for _ in range(min(load.concurrency or 1, len(jobs))):
                group.create_task(_in_turn(waiting, rows))
        else:
            for (index, job), at in zip(enumerate(jobs), _arrivals_s(load.rate_per_s, len(jobs), seed), strict=True):
                await asyncio.sleep(began + at - time.perf_counter())  # not a pause after the last one: it would add up
                group.create_task(_on_arrival(job, began + at, rows, index))
    return Pass(tuple(rows), time.perf_counter() - began)


def _arrivals_s(rate_per_s: float, count: int, seed: int) -> list[float]:
    """Seconds from the first one on. Of a Poisson process whose last question comes just when the rate says: those
    between are spread evenly at random. Gaps drawn one by one would bring 64 questions 10 % too fast or too slow.
    """
    draw, end_s = random.Random(seed), (count - 1) / rate_per_s
    between = sorted(draw.uniform(0, end_s) for _ in range(count - 2))
    return [0.0, *between, end_s][:count]


async def _in_turn(waiting: Iterator[tuple[int, Job]], rows: list[Row]) -> None:
    """One of those that run at a time. It waits for no other: a question that takes long holds up none but itself."""
    for index, job in waiting:
        rows[index] = await job()


async def _on_arrival(job: Job, due_s: float, rows: list[Row], index: int) -> None:
    """A question that an overloaded machine takes up late has waited since it was due, not since it was taken up."""
    late_s = time.perf_counter() - due_s
    row = await job()
    rows[index] = row | {"latency_s": row["latency_s"] + late_s}
