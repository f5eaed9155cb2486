"""The choices of one request (`n`): episodes about the same question, each through the one loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from vtengine.engine.base import Backend, SamplingParams
from vtengine.rollout.episode import Episode, OnEvent, run_episode
from vtengine.rollout.seeds import derive_seed
from vtengine.server.account import is_spent
from vtengine.server.admission import Visit
from vtengine.server.cap import CappedBackend
from vtengine.server.errors import episode_error
from vtengine.server.house import House
from vtengine.server.prepare import Job

T = TypeVar("T")


async def run_choice(job: Job, index: int, visit: Visit, house: House, on_event: OnEvent | None = None) -> Episode:
    """Waits for a place, then runs the episode on the request's own limits. Raises ApiError if it gives no completion.

    Siblings begin with the same ids, so the engine's prefix cache computes their prompt once.
    """
    setting = house.setting
    async with visit.running():
        backend: Backend = setting.backend
        if job.max_tokens is not None:
            backend = CappedBackend(backend, job.max_tokens)
        parts = (setting.pipeline, setting.tokenizer, setting.profile, job.limits, _sampling(job, index))
        episode = await run_episode(job.question, backend, *parts, on_event=on_event)
    house.metrics.count(episode)
    if episode.status in ("rejected", "failed") and not is_spent(episode):
        assert episode.error is not None
        opened = 0 if episode.image is None else 1 + len(episode.more_images)
        image_param = job.image_params[min(opened, len(job.image_params) - 1)] if job.image_params else None
        raise episode_error(episode.status, episode.error, image_param, house.limits.retry_after_s)
    return episode


def _sampling(job: Job, index: int) -> SamplingParams:
    """The first choice is what the request would get with n = 1; the others have seeds made from its seed."""
    sampling = job.sampling
    if index == 0 or sampling.seed is None:
        return sampling
    return replace(sampling, seed=derive_seed(sampling.seed, "choice", index))


async def together(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first that fails, and cancellation, end the others."""
    first, *others = jobs
    if not others:
        return [await first]
    tasks = [asyncio.ensure_future(job) for job in (first, *others)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
