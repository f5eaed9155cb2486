"""What the two-turn suites share: the questions, an engine of either kind, and one measured run over them."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from asking_backend import AskingBackend
from PIL import Image
from vtengine_training.glance import make_scene
from vtengine_training.glance.views import LIMITS

from vtengine.cli.models import shipped_model
from vtengine.cli.scoring import is_correct
from vtengine.engine.base import Backend, SamplingParams
from vtengine.engine.processes import DataParallel
from vtengine.protocol.conversation import Limits
from vtengine.protocol.profile import own_profile
from vtengine.rollout.group import Sample, Setting, run_batch
from vtengine.rollout.question import Question
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.vision.pipeline import ImagePipeline
from vtengine.vision.plan import PixelLimits

SEED = 20250713
"""Of the held-out questions; the split `test` has its own random stream."""
SAMPLING = SamplingParams(max_new_tokens=64, temperature=0.0)


@dataclass(frozen=True)
class Asked:
    """A generated question; `carried` of it holds the answer."""

    question: Question
    answer: str


@dataclass(frozen=True)
class Run:
    """One pass over the questions: seconds of wall and of CPU (of all threads, engines' processes included), and every
    episode, in order."""

    wall_s: float
    cpu_s: float
    samples: tuple[Sample, ...]
    stats: dict[str, float]

    @property
    def replies(self) -> list[tuple[tuple[int, ...], ...]]:
        """Sampled ids of every turn of every episode: what two engines are compared by."""
        return [tuple(turn.completion.token_ids for turn in sample.episode.turns) for sample in self.samples]


def model_folder() -> Path:
    """The shipped model, or another checkpoint named by VTENGINE_BENCH_MODEL."""
    folder = Path(os.environ.get("VTENGINE_BENCH_MODEL") or shipped_model())
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {folder}: no checkpoint there; set VTENGINE_BENCH_MODEL to a folder with one")
    return folder


def held_out_questions(count: int) -> list[Asked]:
    """One question about each of `count` generated pictures, none of which was trained on. Images are data: URLs."""
    asked = []
    for index in range(count):
        scene = make_scene("test", SEED, index)
        query = scene.queries[int(np.random.default_rng([SEED, 17, index]).integers(len(scene.queries)))]
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        asked.append(Asked(Question(index, url, query.question), query.answer))
    return asked


@asynccontextmanager
async def fresh_setting(
    folder: Path,
    make_backend: Callable[[Tokenizer], Backend],
    limits: Limits | None = None,
    pixel_limits: PixelLimits = LIMITS,
    *,
    ask_one_in: int | None = None,
) -> AsyncIterator[Setting]:
    """A fresh backend and a fresh image pipeline, closed afterwards: nothing is cached beforehand.

    ask_one_in: of so many pictures one is made to be asked about twice (see asking_backend.py); None: none is.
    """
    tokenizer = Tokenizer.load(folder)
    pipeline = ImagePipeline(pixel_limits, "compact", torch.float32)
    profile = own_profile(folder, "glance")
    backend = make_backend(tokenizer)
    if isinstance(backend, DataParallel):
        await backend.check()
    if ask_one_in is not None:
        backend = AskingBackend(backend, tokenizer, profile, ask_one_in)
    try:
        yield Setting(backend, pipeline, tokenizer, profile, limits or Limits("adaptive", 2), SAMPLING)
    finally:
        await backend.close()
        pipeline.close()


def run_once(
    folder: Path,
    make_backend: Callable[[Tokenizer], Backend],
    asked: Sequence[Asked],
    concurrency: int,
    limits: Limits | None = None,
    pixel_limits: PixelLimits = LIMITS,
    *,
    ask_one_in: int | None = None,
) -> Run:
    """A pass over the questions in a fresh setting, of which the options are."""

    async def go() -> Run:
        async with fresh_setting(folder, make_backend, limits, pixel_limits, ask_one_in=ask_one_in) as setting:
            wall, busy = time.perf_counter(), cpu_s(setting.backend)
            questions = [one.question for one in asked]
            samples = [sample async for sample in run_batch(setting, questions, concurrency=concurrency)]
            wall, busy = time.perf_counter() - wall, cpu_s(setting.backend) - busy
            return Run(wall, busy, tuple(samples), setting.backend.stats())

    return asyncio.run(go())


def cpu_s(backend: Backend) -> float:
    """CPU seconds of this process and of those that the backend's engines run in."""
    return time.process_time() + backend.stats().get("cpu_s", 0.0)


def account(runs: Sequence[Run], asked: Sequence[Asked]) -> dict[str, Any]:
    """One row about equal runs: medians of times; counts and answers of the last."""
    last = runs[-1]
    wall_s = statistics.median(run.wall_s for run in runs)
    episodes = [sample.episode for sample in last.samples]
    turns = [turn for episode in episodes for turn in episode.turns]
    later = [
        turn.completion.ttft_s
        for run in runs
        for sample in run.samples
        for turn in sample.episode.turns[1:]
    ]  # fmt: skip
    right = [is_correct(episode.answer, [one.answer]) for episode, one in zip(episodes, asked, strict=True)]
    return {
        "questions": len(asked),
        "rounds": len(runs),
        "questions_per_s": len(asked) / wall_s,
        "tokens_per_s": sum(len(turn.completion.token_ids) for turn in turns) / wall_s,
        "ms_per_question": 1e3 * wall_s / len(asked),
        "cpu_ms_per_question": 1e3 * statistics.median(run.cpu_s for run in runs) / len(asked),
        "ttft_turn2_ms": 1e3 * statistics.median(later) if later else None,
        "prompt_tokens": sum(turn.completion.prompt_tokens for turn in turns),
        "prefill_tokens": sum(turn.completion.prefill_tokens for turn in turns),
        "images_encoded": sum(sum(turn.completion.images_encoded) for turn in turns),
        "accuracy": sum(right) / len(right),
        "upscale_ratio": sum(episode.is_upscaled for episode in episodes) / len(episodes),
        "visual_tokens": sum(episode.visual_tokens for episode in episodes),
        "unfinished": sum(episode.status in ("rejected", "failed") for episode in episodes),
    }


def same_replies(run: Run, other: Run) -> float:
    """Share of the episodes whose sampled ids are equal, in every turn."""
    pairs = list(zip(run.replies, other.replies, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)
