"""What is minimised, as plain numbers; one term per token, and its slopes by hand. float32 [N] throughout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-this before the exponential: e^20 is far past any clip, and stays finite."""

PolicyLoss = Literal["clip", "sequence-clip", "clipped-weight", "reinforce"]
KlKind = Literal["k1", "k2", "k3"]
POLICIES = ("clip", "sequence-clip", "clipped-weight", "reinforce")
KLS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class Objective:
    """policy: clip = token ratios, PPO's minimum; sequence-clip = one ratio per sequence, the geometric mean of its
    tokens' (GSPO); clipped-weight = logprob times the clipped ratio, held constant (CISPO); reinforce = no ratio.

    Ratios are clipped to [1 - clip_low, 1 + clip_high]. dual_clip: where the advantage is negative, a token's loss is
    at most dual_clip * |advantage| (Ye et al. 2020). importance_cap: each term times min(p_old / p_rollout, cap), held
    constant.
    """

    policy: PolicyLoss = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl: KlKind = "k3"
    entropy_coef: float = 0.0
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        clips = self.policy in ("clip", "sequence-clip")
        checks = (
            (self.policy in POLICIES, "policy", f"one of {', '.join(POLICIES)}"),
            (self.kl in KLS, "kl", f"one of {', '.join(KLS)}"),
            (0 <= self.clip_low <= 1, "clip_low", "from 0 to 1"),
            (0 <= self.clip_high < math.inf, "clip_high", "0 or more"),
            (self.dual_clip is None or (clips and 1 < self.dual_clip < math.inf), "dual_clip", "> 1, of a clip policy"),
            (0 <= self.kl_coef < math.inf, "kl_coef", "0 or more"),
            (math.isfinite(self.entropy_coef), "entropy_coef", "finite"),
            (self.importance_cap is None or self.importance_cap > 0, "importance_cap", "> 0"),
        )
        for ok, name, allowed in checks:
            if not ok:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be {allowed}")


@dataclass(frozen=True, eq=False)
class Tokens:
    """What is known of the tokens, float32 [N].

    advantages, weights: of each token; the loss is the sum of weight times term. old: logprobs that ratios refer to;
    None = the current ones, held constant. rollout: logprobs at sampling, for importance_cap. ref: the reference
    model's, for the KL term. sequences: int64 [N] in 0 .. num_sequences - 1, for sequence-clip.
    """

    advantages: Tensor
    weights: Tensor
    old: Tensor | None = None
    rollout: Tensor | None = None
    ref: Tensor | None = None
    sequences: Tensor | None = None
    num_sequences: int = 0

    def pick(self, rows: Tensor | slice) -> Tokens:
        """Some of the tokens, each tensor by the same rows."""
        optional = ("old", "rollout", "ref", "sequences")
        picked: dict[str, Any] = {name: None if (x := getattr(self, name)) is None else x[rows] for name in optional}
        return replace(self, advantages=self.advantages[rows], weights=self.weights[rows], **picked)


def losses_and_slopes(
    logprobs: Tensor, entropies: Tensor, tokens: Tokens, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted losses, their sum's slope in each logprob, in each entropy), [N]; the loss is the sum of the first."""
    each, slope = _policy(logprobs, tokens, objective)
    if objective.kl_coef:
        assert tokens.ref is not None
        difference = tokens.ref - logprobs
        inside = (difference.abs() <= MAX_LOG_RATIO).to(logprobs.dtype)
        difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        if objective.kl == "k1":
            penalty, bend = -difference, inside
        elif objective.kl == "k2":
            penalty, bend = 0.5 * difference.square(), -difference * inside
        else:
            penalty, bend = difference.expm1() - difference, -difference.expm1() * inside
        each = each + objective.kl_coef * tokens.weights * penalty
        slope = slope + objective.kl_coef * tokens.weights * bend
    to_entropy = -objective.entropy_coef * tokens.weights
    if objective.entropy_coef:
        each = each + to_entropy * entropies
    return each, slope, to_entropy


def _policy(logprobs: Tensor, tokens: Tokens, objective: Objective) -> tuple[Tensor, Tensor]:
    """(weighted policy terms, slopes in the logprobs)."""
    advantages, old = tokens.advantages, logprobs if tokens.old is None else tokens.old
    scale = tokens.weights
    if objective.importance_cap is not None:
        assert tokens.rollout is not None
        drift = (old - tokens.rollout).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        scale = scale * drift.exp().clamp(max=objective.importance_cap)
    if objective.policy == "reinforce":
        return -advantages * logprobs * scale, -advantages * scale
    log_ratio = logprobs - old
    if objective.policy == "sequence-clip":
        log_ratio = _sequence_means(log_ratio, tokens)
    inside = log_ratio.abs() <= MAX_LOG_RATIO
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    limited = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    if objective.policy == "clipped-weight":
        return -limited * advantages * logprobs * scale, -limited * advantages * scale
    plain, bounded = -ratio * advantages, -limited * advantages
    each, moves = torch.maximum(plain, bounded), inside & ~(bounded > plain)
    if objective.dual_clip is not None:
        most = torch.where(advantages < 0, -objective.dual_clip * advantages, torch.inf)
        each, moves = torch.minimum(each, most), moves & ~(each > most)
    # NaN ratios keep their slope, so that they show in the gradients too
    slope = torch.where(moves | ratio.isnan(), plain, 0.0) * scale
    return each * scale, _sequence_means(slope, tokens) if objective.policy == "sequence-clip" else slope


def _sequence_means(values: Tensor, tokens: Tokens) -> Tensor:
    """[N] -> [N]: each token gets the mean over its sequence."""
    assert tokens.sequences is not None
    sums = values.new_zeros(tokens.num_sequences).index_add(0, tokens.sequences, values)
    sizes = torch.bincount(tokens.sequences, minlength=tokens.num_sequences)
    return (sums / sizes.clamp_min(1))[tokens.sequences]
