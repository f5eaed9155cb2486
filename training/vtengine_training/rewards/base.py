"""The seam between trainer and rewards, and the plain rule-based reward that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from vtengine.cli.scoring import is_correct
from vtengine.rollout.episode import Episode
from vtengine_training.data.examples import Example

FORMAT_REWARD = 0.5


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


class RewardFn(Protocol):
    """Scores episodes. Called concurrently, from one event loop, while other episodes are still being generated.

    An exception drops the group of the episode, is counted and logged; it never ends the run.
    """

    async def score(self, episode: Episode, example: Example) -> Score: ...


class ExactMatch:
    """Accuracy 1 where the answer equals one of the accepted ones by rule; format by the protocol's own parser."""

    async def score(self, episode: Episode, example: Example) -> Score:
        return Score(float(is_correct(episode.answer, example.answers)), format_reward(episode))


def format_reward(episode: Episode) -> float:
    """FORMAT_REWARD if the episode ended with an answer and every reply had the taught form, else 0."""
    flawless = all(not turn.reply.flaws and turn.reply.error is None for turn in episode.turns)
    return FORMAT_REWARD if episode.status == "answered" and flawless else 0.0
