"""Questions in, labelled rows out, in order: each is answered n times at each view, and every answer scored."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from vtengine.protocol.conversation import Limits
from vtengine.rollout.episode import Episode
from vtengine.rollout.group import Setting, in_order, run_sample
from vtengine.rollout.question import Question
from vtengine.rollout.seeds import derive_seed
from vtengine_training.curate.config import CurateConfig
from vtengine_training.curate.label import label
from vtengine_training.data.examples import Example
from vtengine_training.data.images import ImageStore
from vtengine_training.errors import Once
from vtengine_training.rewards.rewarder import Rewarder

log = logging.getLogger(__name__)
View = Literal["low", "high"]
VIEWS: tuple[View, ...] = ("low", "high")
Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What is kept of one rollout. correct: None = no verdict. encoded: the image's file, of a question's first one."""

    correct: bool | None
    encoded: bytes | None
    error: str | None
    visual_tokens: int


class Curation:
    """Plays and labels examples. Memory: the outcomes of the questions under way, and the engine's own caches."""

    def __init__(self, config: CurateConfig, setting: Setting, rewarder: Rewarder, store: ImageStore) -> None:
        self.config, self.rewarder, self.store = config, rewarder, store
        self.settings = {view: _at(setting, view, config) for view in VIEWS}
        self._scoring: set[asyncio.Task[Outcome]] = set()
        self._complained = Once()

    async def rows(self, examples: Sequence[Example]) -> AsyncIterator[Row]:
        """One labelled row per example, in their order. Raises ValueError where settings or server are to blame."""
        size = len(VIEWS) * self.config.rollouts
        jobs = in_order(self._jobs(examples), self.config.concurrency)
        outcomes: list[Outcome] = []
        place = 0
        try:
            async with aclosing(cast("AsyncGenerator[asyncio.Task[Outcome], None]", jobs)) as played:
                async for scoring in played:
                    outcomes.append(await scoring)
                    if len(outcomes) == size:
                        yield self._row(examples[place], outcomes)
                        outcomes, place = [], place + 1
        finally:
            for task in self._scoring:
                task.cancel()

    def _jobs(self, examples: Sequence[Example]) -> Iterator[Callable[[], Awaitable[asyncio.Task[Outcome]]]]:
        for example in examples:
            for view in VIEWS:
                for index in range(self.config.rollouts):
                    yield self._job(example, view, index)

    def _job(self, example: Example, view: View, index: int) -> Callable[[], Awaitable[asyncio.Task[Outcome]]]:
        """Plays one episode; its place in the engine is free while a judge thinks about it."""

        async def run() -> asyncio.Task[Outcome]:
            question = Question(example.id, example.image, example.question, example.root, example.fields)
            episode = (await run_sample(self.settings[view], question, index)).episode
            if (fault := episode.setup_fault) is not None:
                raise ValueError(f"no example can be asked: {fault}")
            scoring = asyncio.create_task(self._score(episode, example, keep_image=view == "low" and index == 0))
            self._scoring.add(scoring)
            scoring.add_done_callback(self._scoring.discard)
            return scoring

        return run

    async def _score(self, episode: Episode, example: Example, keep_image: bool) -> Outcome:
        encoded = episode.image.encoded if keep_image and episode.image is not None else None
        error = None if episode.error is None else episode.error.code
        correct = None
        if episode.turns:
            try:
                score = await self.rewarder.score(episode, example)
                correct = score.is_correct if score.is_usable else None
            except Exception as fault:
                error = f"{type(fault).__name__}: {fault}"
                if self._complained.is_new(error, example.id):
                    log.warning("example %s: no verdict: %s", example.id, error)
        return Outcome(correct, encoded, error, episode.visual_tokens)

    def _row(self, example: Example, outcomes: Sequence[Outcome]) -> Row:
        """The example with its label and counts; the image beside it, named after its content."""
        config = self.config
        low, high = outcomes[: config.rollouts], outcomes[config.rollouts :]
        answer = example.answers[0] if len(example.answers) == 1 else list(example.answers)
        row = {"id": example.id, "question": example.question, "answer": answer, **example.fields}
        encoded = outcomes[0].encoded
        errors = [one.error for one in outcomes if one.error is not None]
        if encoded is None:
            return row | {"label": "rejected", "reason": errors[0] if errors else "unknown"}
        row["image"] = f"{self.store.folder.name}/{self.store.put(encoded)}"
        if any(one.correct is None for one in outcomes):
            return row | {"label": "unscored", "reason": errors[0] if errors else "no verdict"}
        low_correct, high_correct = (sum(one.correct is True for one in part) for part in (low, high))
        given = label(low_correct, high_correct, config.rollouts, config.margin)
        is_needed = {"low_is_enough": False, "needs_high": True}.get(given)
        if row.get("needs_high") is None and is_needed is not None:  # a label that the data came with is kept
            row["needs_high"] = is_needed
        counts = {"low_correct": low_correct, "high_correct": high_correct, "rollouts": config.rollouts}
        tokens = {"low_tokens": low[0].visual_tokens, "high_tokens": high[0].visual_tokens}
        return row | {"label": given} | counts | tokens


def _at(setting: Setting, view: View, config: CurateConfig) -> Setting:
    """One turn at one view, with seeds of its own."""
    limits = Limits(view, 1, max_context_tokens=setting.limits.max_context_tokens)
    sampling = replace(setting.sampling, seed=derive_seed(config.seed, view))
    return replace(setting, limits=limits, sampling=sampling)
