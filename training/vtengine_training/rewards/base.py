"""The seam between trainer and rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from vtengine.rollout.episode import Episode
from vtengine_training.data.examples import Example
from vtengine_training.rewards.format import FORMAT_REWARD, format_reward

__all__ = ["CORRECT_FROM", "FORMAT_REWARD", "RewardError", "RewardFn", "Score", "format_reward"]

CORRECT_FROM = 0.5
"""An accuracy of at least this counts as a correct answer (for the penalty); judge and rules give 0 or 1."""


class RewardError(ValueError):
    """A reward function that raised, or returned what is no reward; the message names it."""


@dataclass(frozen=True)
class Score:
    """What one episode earned before the penalty.

    accuracy: 0 to 1; None = no verdict (judge failed): the whole group is dropped and counted, never scored.
    format: 0 or FORMAT_REWARD. detail: figures for the log, by name.
    """

    accuracy: float | None
    format: float
    detail: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_usable(self) -> bool:
        """There is a verdict, and every part of it is a finite number."""
        return self.accuracy is not None and math.isfinite(self.accuracy) and math.isfinite(self.format)

    @property
    def is_correct(self) -> bool:
        return self.accuracy is not None and self.accuracy >= CORRECT_FROM


class RewardFn(Protocol):
    """Scores episodes. Called concurrently, from one event loop, while other episodes are still being generated.

    An exception drops the group of the episode, is counted and logged; it never ends the run.
    """

    async def score(self, episode: Episode, example: Example) -> Score: ...
