"""Many episodes at the same time, whose results come in input order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from vtengine.engine.base import Backend, SamplingParams
from vtengine.protocol.conversation import Limits
from vtengine.protocol.profile import Profile
from vtengine.rollout.episode import Episode, Views, run_episode
from vtengine.rollout.question import Question
from vtengine.rollout.seeds import derive_seed
from vtengine.rollout.tokenizer import Tokenizer

T = TypeVar("T")
WAITING_PER_RUNNING = 8
"""Finished results that wait for an earlier one, per running episode, before no new one is started."""


@dataclass(frozen=True)
class Setting:
    """What all episodes of a run have in common."""

    backend: Backend
    pipeline: Views
    tokenizer: Tokenizer
    profile: Profile
    limits: Limits
    sampling: SamplingParams


@dataclass(frozen=True)
class Sample:
    """The `index`-th episode of a question."""

    question: Question
    index: int
    episode: Episode


async def run_sample(setting: Setting, question: Question, index: int) -> Sample:
    """One episode with the seed of its place: the same whatever else runs, and in whatever order."""
    sampling = setting.sampling
    if sampling.seed is not None:
        sampling = replace(sampling, seed=derive_seed(sampling.seed, question.id, index))
    episode = await run_episode(
        question, setting.backend, setting.pipeline, setting.tokenizer, setting.profile, setting.limits, sampling
    )
    return Sample(question, index, episode)


async def run_batch(
    setting: Setting, questions: Iterable[Question], n: int = 1, concurrency: int = 8
) -> AsyncIterator[Sample]:
    """n samples of each question, in input order. `questions` is read as far as there is room, no further."""
    jobs = (_job(setting, question, index) for question in questions for index in range(n))
    async for sample in in_order(jobs, concurrency):
        yield sample


async def in_order(jobs: Iterable[Callable[[], Awaitable[T]]], concurrency: int) -> AsyncIterator[T]:
    """Results of the jobs in their order, at most `concurrency` of them running, memory bounded.

    A job that raises ends it; that, closing the iterator and cancellation all cancel what still runs.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency = {concurrency}: must be >= 1")
    slots, room = asyncio.Semaphore(concurrency), asyncio.Semaphore(concurrency * (1 + WAITING_PER_RUNNING))
    tasks: asyncio.Queue[asyncio.Future[T] | None] = asyncio.Queue()
    untaken: set[asyncio.Future[T]] = set()

    async def start() -> None:
        """A job is read only when it can run at once: it may hold much, such as a picture in a line of JSON."""
        source = iter(jobs)
        try:
            while await room.acquire() and await slots.acquire() and (job := next(source, None)) is not None:
                task = asyncio.ensure_future(job())
                untaken.add(task)
                task.add_done_callback(lambda _: slots.release())
                tasks.put_nowait(task)
                await asyncio.sleep(0)  # it sets out before the next one is read
        finally:
            tasks.put_nowait(None)

    starter = asyncio.create_task(start())
    try:
        while (task := await tasks.get()) is not None:
            result = await task
            untaken.discard(task)
            room.release()
            yield result
        await starter  # raises what reading the jobs did
    finally:
        left: list[asyncio.Future[Any]] = [starter, *untaken]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _job(setting: Setting, question: Question, index: int) -> Callable[[], Awaitable[Sample]]:
    return lambda: run_sample(setting, question, index)
