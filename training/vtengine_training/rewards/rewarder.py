"""All that the trainer asks of rewards, in one object: score episodes, total a group, keep state between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtengine.rollout.episode import Episode
from vtengine_training.data.examples import Example
from vtengine_training.rewards import penalty
from vtengine_training.rewards.base import ExactMatch, RewardFn, Score
from vtengine_training.rewards.penalty import PenaltyConfig


@dataclass(frozen=True)
class RewardConfig:
    """The `[reward]` section of a training run."""

    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)


class Rewarder:
    """Built once per run from its config. `state` goes into checkpoints."""

    def __init__(self, config: RewardConfig, function: RewardFn | None = None) -> None:
        self.config = config
        self.function = function or ExactMatch()

    async def score(self, episode: Episode, example: Example) -> Score:
        """One episode, before the penalty. May raise: the caller drops the group and counts it."""
        return await self.function.score(episode, example)

    def totals(self, scores: Sequence[Score], episodes: Sequence[Episode]) -> list[float]:
        """The reward of each sibling of a group."""
        return penalty.apply(scores, [episode.is_upscaled for episode in episodes], self.config.penalty)

    def end_step(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Called once per training step with its rollout metrics; returns more metrics (`judge/*`, `penalty/*`)."""
        del figures
        return {}

    def state(self) -> dict[str, Any]:
        """Plain JSON data; `restore` takes it back."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()` of an earlier process."""
        del state

    async def close(self) -> None:
        """Ends connections and writes caches."""
