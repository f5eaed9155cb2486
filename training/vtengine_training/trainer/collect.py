"""One step's rollouts: groups generated and scored at the same time, spread checked, missing ones drawn again."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import cast

from vtengine.rollout.episode import Episode
from vtengine.rollout.group import Setting, in_order, run_sample
from vtengine.rollout.question import Question
from vtengine.rollout.records import Row
from vtengine.rollout.seeds import derive_seed
from vtengine_training.data.examples import Dataset, Example
from vtengine_training.data.sampler import Sampler
from vtengine_training.errors import Once, Refused
from vtengine_training.grpo.advantage import TurnRewards, advantages, has_spread, turn_advantages
from vtengine_training.grpo.config import LossConfig
from vtengine_training.rewards.base import Score, format_reward
from vtengine_training.rewards.rewarder import Rewarder
from vtengine_training.trainer.config import RolloutConfig
from vtengine_training.trainer.lessons import lessons, taught
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.samples import sample_facts, sample_row
from vtengine_training.trainer.trajectory import Group, from_episode

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sample:
    """One that was played. verdict: on its way, or there; its result is None where the reward function raised."""

    draw: int
    example: int
    episode: Episode
    verdict: asyncio.Task[Score | None]

    @property
    def score(self) -> Score | None:
        """Once the verdict is there."""
        return self.verdict.result()


@dataclass
class Collected:
    """A step's groups to learn from, those of this rank. The rest is of all ranks. `counts`: how many groups are used,
    and what happened to the others. `facts`: of every scored group, dropped ones included, for the metrics. `rows`:
    records for `vtengine view`."""

    groups: list[Group]
    counts: Counter[str] = field(default_factory=Counter)
    facts: list[list[dict[str, float]]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class Collector:
    """Keeps the sampler and the groups left over from earlier steps; both are part of a checkpoint.

    All ranks draw the same prompts, and each plays those whose draws it owns. How many are still missing, and which
    groups are used, is decided over all of them: the lowest draws with spread, whatever the number of ranks.
    """

    def __init__(
        self,
        setting: Setting,
        dataset: Dataset,
        sampler: Sampler,
        rewarder: Rewarder,
        config: RolloutConfig,
        loss: LossConfig,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.setting, self.dataset, self.sampler, self.rewarder = setting, dataset, sampler, rewarder
        self.ranks = ranks or Ranks()
        self.config, self.loss, self.seed = config, loss, seed
        self.leftover: list[Group] = []
        self._complained: set[str] = set()
        self._unrewarded = Once()
        self._scoring: list[asyncio.Task[Score | None]] = []

    async def collect(self, step: int, keep_rows: bool = False) -> Collected:
        """At most config.prompts groups with spread; fewer when max_refill draws did not give more.

        Raises Refused, on every rank, where settings or server are to blame for a refusal: no example is.
        """
        done = Collected([])
        fresh = [group for group in self.leftover if step - group.step <= self.config.max_stale]
        done.counts["stale"] = len(self.leftover) - len(fresh)
        draws = self._draws(fresh)
        reused, kept, drawn, waves = min(len(draws), self.config.prompts), len(draws), 0, 0
        bound = math.ceil(self.config.prompts * self.config.max_refill)
        while (missing := self.config.prompts - len(draws)) > 0 and drawn < bound:
            expected = (len(draws) - kept + 1) / (drawn + 1)  # usable groups of one that is drawn: 1 at first
            wave = min(math.ceil(missing * self.config.oversample / expected), bound - drawn)
            drawn += wave
            waves += 1
            fresh += await self._wave(wave, step, done, keep_rows)
            draws = self._draws(fresh)
        used = set(draws[: self.config.prompts])
        done.groups = [group for group in fresh if group.draw in used]
        self.leftover = [group for group in fresh if group.draw not in used]
        self._share(done)
        surplus = len(draws) - len(used)
        done.counts |= {"reused": reused, "drawn": drawn, "waves": waves, "used": len(used), "surplus": surplus}
        return done

    def _draws(self, groups: Sequence[Group]) -> list[int]:
        """The draws of all ranks' groups, ascending."""
        return sorted(draw for part in self.ranks.gather([group.draw for group in groups]) for draw in part)

    def _share(self, done: Collected) -> None:
        """What one rank counted, measured and recorded, for all."""
        if self.ranks.is_alone:
            return
        found = self.ranks.gather([dict(done.counts), done.facts, done.rows])
        done.counts = sum((Counter(counts) for counts, _, _ in found), Counter())
        done.facts = [group for _, facts, _ in found for group in facts]
        done.rows = sorted((row for _, _, rows in found for row in rows), key=lambda row: (row["draw"], row["sample"]))

    async def _wave(self, count: int, step: int, done: Collected, keep_rows: bool) -> list[Group]:
        """Groups in the order of their draws, whatever order they finish in; those that teach nothing left out."""
        jobs = []
        for _ in range(count):
            draw, example = self.sampler.draw()
            if self.ranks.owns(draw):
                jobs += [self._job(draw, example, index) for index in range(self._num_siblings(example))]
        groups: list[Group] = []
        siblings: list[Sample] = []
        fault: str | None = None
        try:
            async with aclosing(
                cast("AsyncGenerator[Sample, None]", in_order(jobs, self.config.concurrency))
            ) as results:
                async for sample in results:
                    if (fault := sample.episode.setup_fault) is not None:
                        break
                    await sample.verdict
                    siblings.append(sample)
                    if len(siblings) == self._num_siblings(sample.example):
                        group = self._group(siblings, step, done, keep_rows)
                        groups += [] if group is None else [group]
                        siblings = []
        finally:
            for task in self._scoring:
                task.cancel()
            self._scoring.clear()
        if faults := [one for one in self.ranks.gather(fault) if one is not None]:
            raise Refused(f"no example can be asked: {faults[0]} (nothing is quarantined, checkpoints stay)")
        for examples, reason in self.ranks.gather([sorted(self.sampler.quarantined), self.sampler.reason]):
            for example in examples:
                self.sampler.quarantine(example, reason)
        return groups

    def _num_siblings(self, example: int) -> int:
        return len(self._lessons(example)) if self.loss.is_supervised else self.config.n

    def _lessons(self, example: int) -> list[tuple[str, ...]]:
        return lessons(self.dataset.examples[example], self.setting.profile, self.setting.limits)

    def _job(self, draw: int, example: int, index: int) -> Callable[[], Awaitable[Sample]]:
        """Plays one episode. Its place in the engine is free while a judge thinks about it."""

        async def run() -> Sample:
            one = self.dataset.examples[example]
            sampling = replace(self.setting.sampling, seed=derive_seed(self.seed, "draw", draw))
            setting = replace(self.setting, sampling=sampling)
            if self.loss.is_supervised:
                setting = taught(setting, self._lessons(example)[index])
            question = Question(one.id, one.image, one.question, one.root, one.fields)
            episode = (await run_sample(setting, question, index)).episode
            verdict = asyncio.create_task(self._score(episode, one))
            self._scoring.append(verdict)
            return Sample(draw, example, episode, verdict)

        return run

    async def _score(self, episode: Episode, example: Example) -> Score | None:
        if not episode.turns:
            return None
        if self.loss.is_supervised:
            return Score(1.0 if episode.status == "answered" else None, format_reward(episode))
        try:
            return await self.rewarder.score(episode, example)
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            if self._unrewarded.is_new(words, example.id):
                log.warning("example %s: no reward, its group is dropped, as are others like it: %s", example.id, words)
            return None

    def _group(self, siblings: Sequence[Sample], step: int, done: Collected, keep_rows: bool) -> Group | None:
        """The siblings as a group to learn from, or None with the reason counted."""
        first = siblings[0]
        reason = self._fault(siblings)
        if reason is not None:
            done.counts[reason] += 1
            return None
        scores = [one.score for one in siblings if one.score is not None]
        episodes = [one.episode for one in siblings]
        rewards = self.rewarder.totals(scores, episodes)
        if not all(math.isfinite(reward) for reward in rewards):
            done.counts["reward_failed"] += 1
            return None
        kind = self.loss.objective.advantage
        values = advantages(rewards, kind)
        example = self.dataset.examples[first.example]
        facts = [sample_facts(*one, example=example) for one in zip(episodes, scores, rewards, strict=True)]
        done.facts.append(facts)
        by_turn: list[tuple[float, ...]] = [()] * len(episodes)
        if self.loss.turn_advantages:
            parts = [TurnRewards(fact["accuracy"], fact["format"], fact["penalty"]) for fact in facts]
            by_turn = turn_advantages(parts, [len(episode.turns) for episode in episodes], kind)
        if keep_rows:
            done.rows += [
                sample_row(episode, index, example, step, first.draw, facts[index], values[index], by_turn[index])
                for index, episode in enumerate(episodes)
            ]
        if not (self.loss.is_supervised or has_spread(rewards)):
            done.counts["zero_spread"] += 1
            return None
        made = [from_episode(*one) for one in zip(episodes, values, facts, by_turn, strict=True)]
        return Group(first.draw, first.example, step, tuple(made))

    def _complain_of_engine(self, episode: Episode) -> None:
        """Of each kind of fault once: out of memory, for one, would else be seen in a count alone."""
        code = "no reply" if episode.error is None else episode.error.code
        if code not in self._complained:
            self._complained.add(code)
            words = "it has no turns" if episode.error is None else episode.error.message
            log.warning(
                "example %s: its group is dropped, as are others like it: %s: %s", episode.question.id, code, words
            )

    def _fault(self, siblings: Sequence[Sample]) -> str | None:
        """Why the group cannot be used: quarantined, failed or reward_failed (no verdict, NaN, an exception)."""
        for one in siblings:
            error = one.episode.error
            if one.episode.status == "rejected" and not one.episode.turns and error and error.blame == "request":
                if one.example not in self.sampler.quarantined:  # once, not for every draw of it
                    log.warning("example %s is quarantined: %s", one.episode.question.id, error.message)
                self.sampler.quarantine(one.example, error.message)
                return "quarantined"
        broken = [
            one.episode for one in siblings if one.episode.status in ("failed", "rejected") or not one.episode.turns
        ]
        if broken:
            self._complain_of_engine(broken[0])
            return "failed"
        if any(one.score is None or not one.score.is_usable for one in siblings):
            return "reward_failed"
        return None
