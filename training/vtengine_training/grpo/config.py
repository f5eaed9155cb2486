"""Which objective, in frozen dataclasses. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vtengine_training.grpo.advantage import AdvantageKind

Algorithm = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "sft"]
PolicyLoss = Literal["clip", "sequence-clip", "clipped-weight", "reinforce"]
Aggregation = Literal["sequence-mean", "token-mean", "prompt-mean", "constant"]
KlKind = Literal["k1", "k2", "k3"]
OldLogprobs = Literal["rollout", "recompute"]


@dataclass(frozen=True)
class Objective:
    """A loss with every choice made.

    policy: clip = token ratios, PPO's minimum; sequence-clip = one ratio per sequence, the geometric mean of its
    tokens'; clipped-weight = log-probability times the clipped ratio, which is held constant; reinforce = no ratio.
    Ratios are clipped to [1 - clip_low, 1 + clip_high].
    aggregation: how tokens add up; see `weights.token_weights`.
    """

    advantage: AdvantageKind
    policy: PolicyLoss
    clip_low: float
    clip_high: float
    aggregation: Aggregation


PRESETS: Mapping[Algorithm, Objective] = {
    "grpo": Objective("standardised", "clip", 0.2, 0.2, "sequence-mean"),
    "dr_grpo": Objective("centred", "clip", 0.2, 0.2, "constant"),
    "dapo": Objective("standardised", "clip", 0.2, 0.28, "token-mean"),
    "gspo": Objective("standardised", "sequence-clip", 3e-4, 4e-4, "sequence-mean"),
    "cispo": Objective("standardised", "clipped-weight", 1.0, 0.28, "token-mean"),
    "rloo": Objective("leave-one-out", "reinforce", 0.2, 0.2, "constant"),
    "sft": Objective("one", "reinforce", 0.2, 0.2, "token-mean"),
}


@dataclass(frozen=True)
class LossConfig:
    """`algorithm` names a published combination; what else is given changes that part of it. sft: replies are written
    from the rows' answers instead of sampled, and the loss is minus the mean log-probability of their tokens.

    dual_clip: where the advantage is negative, a token's loss is at most dual_clip * |advantage|; of the clip policies.
    kl_coef > 0 needs the reference model (the one training began with). importance_cap: the truncated importance
    correction of the rollout engine's log-probabilities, min(old / rollout, cap) per token; needs old_logprobs =
    "recompute". old_logprobs: those the engine sampled with, or computed again by the trainer before the first update;
    of groups that older weights sampled, without a cap, those the engine sampled with in either case.
    turn_advantages: tokens that ask for a view and tokens that answer are credited with their own parts of the reward,
    see `advantage.turn_advantages`.
    """

    algorithm: Algorithm = "grpo"
    advantage: AdvantageKind | None = None
    policy: PolicyLoss | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    aggregation: Aggregation | None = None
    kl_coef: float = 0.0
    kl: KlKind = "k3"
    entropy_coef: float = 0.0
    old_logprobs: OldLogprobs = "rollout"
    importance_cap: float | None = None
    turn_advantages: bool = False

    def __post_init__(self) -> None:
        checks = (
            (self.clip_low is None or 0 <= self.clip_low <= 1, "clip_low", self.clip_low, "from 0 to 1"),
            (self.clip_high is None or self.clip_high >= 0, "clip_high", self.clip_high, "0 or more"),
            (self.dual_clip is None or 1 < self.dual_clip < math.inf, "dual_clip", self.dual_clip, "more than 1"),
            (self.kl_coef >= 0 and math.isfinite(self.kl_coef), "kl_coef", self.kl_coef, "0 or more"),
            (math.isfinite(self.entropy_coef), "entropy_coef", self.entropy_coef, "finite"),
            (self.importance_cap is None or self.importance_cap > 0, "importance_cap", self.importance_cap, "> 0"),
        )
        for ok, name, value, allowed in checks:
            if not ok:
                raise ValueError(f"{name} = {value}: must be {allowed}")
        if self.is_supervised:
            self._check_supervised()
        elif self.advantage == "one":
            raise ValueError('advantage = "one": rewards would not count; it belongs to algorithm = "sft"')
        if self.dual_clip is not None and self.objective.policy not in ("clip", "sequence-clip"):
            raise ValueError(
                f"dual_clip = {self.dual_clip}: bounds a clipped loss, and policy = {self.objective.policy!r} has none"
            )
        if self.importance_cap is not None and self.old_logprobs != "recompute":
            raise ValueError(
                f"importance_cap = {self.importance_cap}: corrects recomputed log-probabilities; "
                'set old_logprobs = "recompute", or leave it out (ratios to the rollout correct themselves)'
            )

    @property
    def is_supervised(self) -> bool:
        """Whether replies are written instead of sampled: no reward, no ratio."""
        return self.algorithm == "sft"

    def _check_supervised(self) -> None:
        given = ("advantage", "policy", "clip_low", "clip_high", "dual_clip", "importance_cap")
        unfit = [name for name in given if getattr(self, name) is not None]
        unfit += ["turn_advantages"] if self.turn_advantages else []
        unfit += ["old_logprobs"] if self.old_logprobs != "rollout" else []
        if unfit:
            raise ValueError(f'{", ".join(unfit)}: algorithm = "sft" samples nothing; leave out')

    @property
    def objective(self) -> Objective:
        """The preset with the given parts replaced."""
        preset = PRESETS[self.algorithm]
        return Objective(
            self.advantage or preset.advantage,
            self.policy or preset.policy,
            preset.clip_low if self.clip_low is None else self.clip_low,
            preset.clip_high if self.clip_high is None else self.clip_high,
            self.aggregation or preset.aggregation,
        )
