"""From the rewards of a group of siblings to the advantage of each. Plain floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

AdvantageKind = Literal["standardised", "centred", "leave-one-out", "one"]
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


@dataclass(frozen=True)
class TurnRewards:
    """A sibling's reward in its parts; the whole is accuracy + format - penalty."""

    accuracy: float
    format: float
    penalty: float

    @property
    def whole(self) -> float:
        return self.accuracy + self.format - self.penalty

    @property
    def asking(self) -> float:
        """What came of the decision to look again: whether it helped, and its price."""
        return self.accuracy - self.penalty

    @property
    def answering(self) -> float:
        """What came of the answer, whatever the look before it cost."""
        return self.accuracy + self.format


def turn_advantages(
    siblings: Sequence[TurnRewards], turns: Sequence[int], kind: AdvantageKind = "standardised"
) -> list[tuple[float, ...]]:
    """One advantage per turn of each sibling (decoupled credit, after AdaptVision, arXiv 2512.03794).

    turns: how many each sibling has. A turn that another one follows is credited with `asking`, the last of several
    with `answering`, and a single turn, which decided and answered, with `whole`. Each is compared with the same part
    of all siblings.
    """
    if len(siblings) != len(turns):
        raise ValueError(f"{len(siblings)} siblings with {len(turns)} numbers of turns: must be equally many")
    asking = advantages([one.asking for one in siblings], kind)
    answering = advantages([one.answering for one in siblings], kind)
    whole = advantages([one.whole for one in siblings], kind)
    return [(whole[i],) if count == 1 else (*[asking[i]] * (count - 1), answering[i]) for i, count in enumerate(turns)]


def advantages(rewards: Sequence[float], kind: AdvantageKind = "standardised") -> list[float]:
    """One advantage per sibling.

    standardised: (R - mean) / (deviation + 1e-6), as GRPO. centred: R - mean, as Dr.GRPO. leave-one-out: R minus the
    mean of the other siblings, as RLOO. one: 1 for all, whatever the rewards. A single sibling gets 0, but for `one`.
    Raises ValueError for a reward that is not finite.
    """
    if not all(math.isfinite(reward) for reward in rewards):
        raise ValueError(f"rewards = {list(rewards)}: must be finite")
    count = len(rewards)
    if kind == "one":
        return [1.0] * count
    if count < 2:
        return [0.0] * count
    mean = math.fsum(rewards) / count
    scale = {"standardised": 1 / (deviation(rewards) + EPSILON), "centred": 1.0, "leave-one-out": count / (count - 1)}
    return [(reward - mean) * scale[kind] for reward in rewards]
