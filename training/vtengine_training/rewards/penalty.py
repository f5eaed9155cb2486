"""Penalty control: what a second look costs. Two published forms, none, and a price per visual token of our own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vtengine_training.rewards.base import Score

Form = Literal["off", "paper", "released", "budget"]


@dataclass(frozen=True)
class BudgetConfig:
    """The price of a whole high view is held where the share of upscaled episodes is `target`.

    gain: how much the price moves per step and unit of ratio above the target. damping: moves the price for this step
    only, against overshoot. A price below `most` = 0.5 never makes a wrong answer worth more than a correct one.
    least: 0 = the target is an upper bound; below 0 looking may be paid for, so the ratio is held from below too.
    """

    target: float = 0.3
    gain: float = 0.02
    damping: float = 0.1
    start: float = 0.1
    least: float = 0.0
    most: float = 0.5

    def __post_init__(self) -> None:
        checks = (
            ("target", 0 <= self.target <= 1, "from 0 to 1"),
            ("gain", 0 < self.gain <= 1, "above 0, at most 1"),
            ("damping", 0 <= self.damping <= 10, "from 0 to 10"),
            ("least", -1 <= self.least <= 0, "from -1 to 0"),
            ("most", 0 < self.most <= 1, "above 0, at most 1"),
            ("start", self.least <= self.start <= self.most, "between least and most"),
        )
        for name, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name} = {getattr(self, name)}: must be {allowed}")


@dataclass(frozen=True)
class PenaltyConfig:
    """form: off, one of the two published ones, or budget. theta: the share of direct answers below which they lose.

    size: what is lost, in reward. theta and size are those of `paper` and `released`; `budget` has its own section.
    """

    form: Form = "paper"
    theta: float = 0.2
    size: float = 0.1
    budget: BudgetConfig = field(default_factory=BudgetConfig)

    def __post_init__(self) -> None:
        for name, value in (("theta", self.theta), ("size", self.size)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value}: must be from 0 to 1")


def apply(
    scores: Sequence[Score],
    upscaled: Sequence[bool],
    config: PenaltyConfig,
    extra_views: Sequence[float] | None = None,
    price: float = 0.0,
) -> list[float]:
    """The total reward of each sibling of a group: accuracy + format - penalty.

    paper: r = correct direct / correct; r < theta: direct answers lose `size`, else upscaled ones do; wrong answers
    too, as the equation is written. released: a correct upscaled answer always loses; where 0 < r < theta, correct
    direct ones lose too. Without a correct answer r does not exist, and nobody loses.
    budget: everyone loses `price` times its extra_views, the visual tokens beyond the low view as a share of the high
    view's. Raises ValueError for a score without a verdict.
    """
    for place, score in enumerate(scores):
        if not score.is_usable:
            raise ValueError(f"score {place} of the group has no verdict: {score}; drop the group")
    if config.form == "budget":
        if extra_views is None:
            raise ValueError('penalty.form = "budget": needs the visual tokens of every sibling')
        lost = [price * extra for extra in extra_views]
    else:
        right = [score.is_correct for score in scores]
        lost = [config.size if loses else 0.0 for loses in _losers(right, upscaled, config)]
    return [_plain(score) - loss for score, loss in zip(scores, lost, strict=True)]


def _plain(score: Score) -> float:
    assert score.accuracy is not None
    return score.accuracy + score.format


def _losers(right: Sequence[bool], upscaled: Sequence[bool], config: PenaltyConfig) -> list[bool]:
    """Who loses `size`, under one of the published forms."""
    num_right = sum(right)
    pairs = list(zip(right, upscaled, strict=True))
    if config.form == "off" or num_right == 0:
        return [False] * len(pairs)
    ratio = sum(ok and not up for ok, up in pairs) / num_right
    if config.form == "paper":
        return [up == (ratio >= config.theta) for _, up in pairs]
    return [ok and (up or 0 < ratio < config.theta) for ok, up in pairs]


class BudgetController:
    """The dual variable of `upscale ratio <= target`: integral action, clipped (so it never winds up), with damping."""

    def __init__(self, config: BudgetConfig) -> None:
        self.config = config
        self.dual = config.start
        self.price = config.start

    def update(self, upscale_ratio: float) -> float:
        """Takes the ratio of one step (0 to 1) and returns the price for the next. Raises ValueError if not finite."""
        if not math.isfinite(upscale_ratio) or not 0 <= upscale_ratio <= 1:
            raise ValueError(f"upscale ratio = {upscale_ratio}: must be from 0 to 1")
        excess = upscale_ratio - self.config.target
        self.dual = self._clip(self.dual + self.config.gain * excess)
        self.price = self._clip(self.dual + self.config.damping * excess)
        return self.price

    def _clip(self, value: float) -> float:
        return min(max(value, self.config.least), self.config.most)

    def state_dict(self) -> dict[str, float]:
        return {"dual": self.dual, "price": self.price}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Values outside of the limits, which may have changed, are clipped. Raises ValueError for another state."""
        try:
            dual, price = float(state["dual"]), float(state["price"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"penalty state {dict(state)!r}: needs the numbers dual and price") from None
        if not math.isfinite(dual) or not math.isfinite(price):
            raise ValueError(f"penalty state {dict(state)!r}: must be finite")
        self.dual, self.price = self._clip(dual), self._clip(price)
