"""The training loop: rollouts, updates, metrics, checkpoints. Stops at a signal after the step it is in."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

from vtengine.rollout.records import Row, RowWriter
from vtengine_training.fingerprint import weights_fingerprint
from vtengine_training.rewards.rewarder import Rewarder
from vtengine_training.seeding import seed_generators
from vtengine_training.trainer import state
from vtengine_training.trainer.alarms import Alarms
from vtengine_training.trainer.collect import Collected
from vtengine_training.trainer.config import GrpoConfig
from vtengine_training.trainer.cost import ModelCost
from vtengine_training.trainer.memory import peak_memory_gib
from vtengine_training.trainer.parts import build_parts
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.rollouts import Rollouts
from vtengine_training.trainer.schedule import learning_rate
from vtengine_training.trainer.step import TrainingDiverged
from vtengine_training.trainer.validate import validate

log = logging.getLogger(__name__)
Figures = dict[str, float]
Report = Callable[[Figures], None]
REMEDIES = {
    "zero_spread": "raise rollout.n, rollout.temperature or rollout.max_refill, or look at the reward; a model that "
    "does not keep to the format (status/answered) needs a cold start first: loss.algorithm = sft",
    "failed": "the engine could not play them: see its words, and what --dry-run says of memory",
    "reward_failed": "there was no verdict on their answers: see the words of judge or reward function",
}
"""Where nothing is learned, by what became of most groups."""
OF_SAMPLED = ("staleness/", "mismatch/", "reward/", "samples/", "clip_frac", "approx_kl")
"""Metrics that say nothing of replies that were written instead of sampled."""


class Run:
    """One run in its output folder. `stop_requested`: finish the step, save, return (a signal handler sets it).

    With several ranks every one of them has a Run, and all call the same methods; the metrics are those of all.
    """

    def __init__(self, config: GrpoConfig, rewarder: Rewarder | None = None, ranks: Ranks | None = None) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.output = Path(config.output)
        self.parts = build_parts(config, rewarder, self.ranks)
        self.rollouts = Rollouts(self.parts.collector, config.rollout.dump_every)
        self.fingerprints = {
            "data": self.parts.dataset.fingerprint,
            "model": weights_fingerprint(self.parts.folder),
        }
        self.alarms = Alarms(self.parts.collector.setting.limits.num_turns > 1)
        self.cost = ModelCost.of(self.parts.model.config)
        self.step = 0
        self.empty_steps = 0
        self.counts: dict[str, int] = {}
        self.seconds_saving = 0.0
        self.changes: list[str] = []
        self.stop_requested = False

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    async def train(self, report: Report) -> None:
        """From where the run is to config.steps, or until stop_requested; saved at the end either way.

        Raises TrainingDiverged when updates or rollouts keep failing, or when nothing was learned to the end;
        ValueError when the judge is down at the start, or no example can be asked.
        """
        saved, every = self.step, self.config.validation.every
        await self.parts.rewarder.start()
        await self.parts.publisher.publish(self.parts.learner.version)
        if every and self.step == 0 and not self.ranks.any(self.stop_requested):
            report({"step": 0.0} | await self.validate())  # what training starts from
        while self.step < self.config.steps and not self.ranks.any(self.stop_requested):
            figures = await self.advance()
            if every and (self.step % every == 0 or self.step == self.config.steps):
                figures |= await self.validate()
            report(figures)  # before the save: a kill in between must not lose the row of a saved step
            for alarm in self.alarms.check(figures) if self.ranks.is_first else ():
                log.warning("step %d: %s", self.step, alarm)
            if self.step % self.config.checkpoint.every == 0 and self.has_learned:
                self.save()
                saved = self.step
        if self.step == self.config.steps and not self.has_learned:
            self._give_up(f"none of {self.step} steps changed a weight, so there is nothing to export")
        if saved != self.step:
            self.save()

    async def advance(self) -> Figures:
        """One training step; returns its metrics."""
        parts, began = self.parts, time.perf_counter()
        seed_generators(self.config.seed, "step", self.step, self.ranks.rank)
        sampled = await self.rollouts.take(self.step + 1)
        collected = sampled.collected
        figures: Figures = {"step": self.step + 1.0} | sampled.figures | self._staleness(collected)
        await parts.publisher.release()
        if self.config.rollout.ahead and self.step + 1 < self.config.steps:
            figures |= await self.rollouts.ahead(self.step + 2, partial(self._learn, collected))
        else:
            figures |= self._learn(collected)
        learned = time.perf_counter()
        await parts.publisher.publish(parts.learner.version)
        published = time.perf_counter()
        self.step += 1
        self._count_empty(collected)
        if collected.rows and self.ranks.is_first:
            self._dump(collected.rows)
        figures |= {
            "time/wait": learned - began - figures["time/learn"],
            "time/publish": published - learned,
            "time/save": self.seconds_saving,
            "time/step": time.perf_counter() - began,
            "memory/peak_gib": max(self.ranks.gather(peak_memory_gib(parts.model.device))),
        }
        self.seconds_saving = 0.0
        figures |= self._speed(figures)
        if self.config.loss.is_supervised:
            figures = {name: value for name, value in figures.items() if not name.startswith(OF_SAMPLED)}
        return figures

    def _learn(self, collected: Collected) -> Figures:
        began, rate = time.perf_counter(), self.rate(self.step)
        figures = self.parts.learner.learn(collected.groups, rate) if collected.counts["used"] else {"lr": rate}
        return figures | {"time/learn": time.perf_counter() - began}

    async def validate(self) -> Figures:
        """Greedy episodes on the held-out questions, with the current weights."""
        began = time.perf_counter()
        assert self.parts.validation is not None
        collector = self.parts.collector
        found = await validate(
            collector.setting,
            self.parts.validation,
            self.parts.rewarder.function,
            collector.config.concurrency,
            self.ranks,
        )
        await self.parts.publisher.publish(self.parts.learner.version)  # what it cached must not depend on validation
        return found | {"time/validate": time.perf_counter() - began}

    @property
    def has_learned(self) -> bool:
        """Whether the weights are not those any more that the run began with: one update was made, and not skipped."""
        return self.parts.learner.version > self.parts.learner.skipped

    def rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        return learning_rate(self.config.update, step, self.config.steps)

    def save(self) -> None:
        """Writes a checkpoint; the next step's metrics say how long it took. Raises OSError, older ones intact."""
        began = time.perf_counter()
        state.save(self)
        self.seconds_saving = time.perf_counter() - began

    def resume(self) -> bool:
        """Goes on from the newest checkpoint, if there is one; `changes` says what is set otherwise since then.

        Raises CheckpointError where it cannot.
        """
        return state.resume(self)

    async def close(self) -> None:
        """Stops engine and pipeline."""
        await self.parts.engine.close()
        self.parts.pipeline.close()
        await self.parts.rewarder.close()

    def _count_empty(self, collected: Collected) -> None:
        self.empty_steps = 0 if collected.counts["used"] else self.empty_steps + 1
        self.counts = {name: count for name, count in collected.counts.items() if count}
        if self.empty_steps >= self.config.update.max_skipped:
            self._give_up(f"{self.empty_steps} steps in a row had no group with spread in its rewards")

    def _give_up(self, what: str) -> NoReturn:
        """Raises ValueError where the data are to blame, else TrainingDiverged."""
        self.parts.collector.sampler.check_drawn()
        reason = max(REMEDIES, key=lambda name: self.counts.get(name, 0))
        counts = ", ".join(f"{name} {count:g}" for name, count in self.counts.items())
        raise TrainingDiverged(f"{what} (groups of the last one: {counts}); {REMEDIES[reason]}")

    def _staleness(self, collected: Collected) -> Figures:
        own = [one.version for group in collected.groups for one in group.trajectories]
        versions = self.ranks.total({"sum": sum(own), "count": len(own)})
        if not versions["count"]:
            return {}
        return {"staleness/mean": self.parts.learner.version - versions["sum"] / versions["count"]}

    def _speed(self, figures: Figures) -> Figures:
        samples = figures["groups/drawn"] * self.config.rollout.n
        found = {"samples/per_second": samples / figures["time/step"]}
        if self.config.peak_tflops and "tokens/packed" in figures:
            work = self.cost.training_flops(
                figures["tokens/packed"],
                figures["tokens/trained"],
                figures["patches/encoded"],
                self.config.trains_vision,
                bool(self.config.lora.rank),
            )
            peak = self.config.peak_tflops * 1e12 * self.ranks.size
            found["mfu"] = work / figures["time/learn"] / peak
        return found

    def _dump(self, rows: list[Row]) -> None:
        folder = self.output / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        with RowWriter(folder / f"step-{self.step:06d}.jsonl") as writer:
            for row in rows:
                if "image_path" in row:
                    row = row | {"image_path": Path(os.path.relpath(row["image_path"], folder.resolve())).as_posix()}
                writer.append(row)
