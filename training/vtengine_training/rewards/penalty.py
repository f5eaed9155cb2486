"""Penalty control: the price of a second look, by the share of correct answers that came without one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vtengine_training.rewards.base import Score

Form = Literal["off", "paper", "released"]


@dataclass(frozen=True)
class PenaltyConfig:
    """form: off, or one of the two published ones. theta: the share of direct answers below which they lose.

    size: what is lost, in reward.
    """

    form: Form = "paper"
    theta: float = 0.2
    size: float = 0.1

    def __post_init__(self) -> None:
        for name, value in (("theta", self.theta), ("size", self.size)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value}: must be from 0 to 1")


def apply(scores: Sequence[Score], upscaled: Sequence[bool], config: PenaltyConfig) -> list[float]:
    """The total reward of each sibling of a group: accuracy + format - penalty.

    paper: r = correct direct / correct; r < theta: direct answers lose `size`, else upscaled ones do.
    released: a correct upscaled answer always loses; where 0 < r < theta, correct direct ones lose too.
    Raises ValueError for a score without a verdict.
    """
    for place, score in enumerate(scores):
        if not score.is_usable:
            raise ValueError(f"score {place} of the group has no verdict: {score}; drop the group")
    right = [(score.accuracy or 0.0) > 0 for score in scores]
    num_right = sum(right)
    num_direct = sum(ok and not up for ok, up in zip(right, upscaled, strict=True))
    ratio = num_direct / num_right if num_right else 1.0
    totals = []
    for score, ok, up in zip(scores, right, upscaled, strict=True):
        if config.form == "paper":
            loses = up if ratio >= config.theta else not up
        elif config.form == "released":
            loses = ok and (up or 0 < ratio < config.theta)
        else:
            loses = False
        totals.append((score.accuracy or 0.0) + score.format - (config.size if loses else 0.0))
    return totals
