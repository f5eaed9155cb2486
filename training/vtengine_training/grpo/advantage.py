"""From the rewards of a group of siblings to the advantage of each. Plain floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

AdvantageKind = Literal["standardised", "centred", "leave-one-out"]
EPSILON = 1e-6
SPREAD = 1e-4
"""Groups whose rewards deviate less (sample standard deviation) teach nothing."""


def deviation(rewards: Sequence[float]) -> float:
    """Sample standard deviation (n - 1); 0 for fewer than two."""
    if len(rewards) < 2:
        return 0.0
    mean = math.fsum(rewards) / len(rewards)
    return math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))


def has_spread(rewards: Sequence[float], limit: float = SPREAD) -> bool:
    """Whether the siblings differ enough to learn from."""
    return deviation(rewards) > limit


def advantages(rewards: Sequence[float], kind: AdvantageKind = "standardised") -> list[float]:
    """One advantage per sibling.

    standardised: (R - mean) / (deviation + 1e-6), as GRPO. centred: R - mean, as Dr.GRPO. leave-one-out: R minus the
    mean of the other siblings, as RLOO. A single sibling gets 0. Raises ValueError for a reward that is not finite.
    """
    if not all(math.isfinite(reward) for reward in rewards):
        raise ValueError(f"rewards = {list(rewards)}: must be finite")
    count = len(rewards)
    if count < 2:
        return [0.0] * count
    mean = math.fsum(rewards) / count
    scale = {"standardised": 1 / (deviation(rewards) + EPSILON), "centred": 1.0, "leave-one-out": count / (count - 1)}
    return [(reward - mean) * scale[kind] for reward in rewards]
