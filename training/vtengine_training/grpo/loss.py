"""The losses, pure: log-probabilities of sampled tokens in, one scalar and its figures out.

Suffixes: N trainable tokens of a micro-batch, S its sequences. All tensors float32 or float64, on one device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtengine_training.grpo.config import KlKind, LossConfig, Objective

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-this before the exponential: e^20 is far past any clip, and stays finite."""


@dataclass(frozen=True)
class Tokens:
    """What the loss knows of the trainable tokens of a micro-batch.

    old: log-probabilities that ratios refer to. rollout: those the engine sampled with. ref: the reference model's.
    advantages, weights: per token (see `weights.token_weights`); a token of weight 0 is padding, and in no figure.
    sequences: int64 [N] in 0..S-1, ascending.
    """

    old: Tensor
    rollout: Tensor
    advantages: Tensor
    weights: Tensor
    sequences: Tensor
    num_sequences: int
    ref: Tensor | None = None


@dataclass(frozen=True)
class LossResult:
    """total: the scalar to differentiate. figures: scalars without gradients, sums over `tokens` tokens, to be added
    over micro-batches."""

    total: Tensor
    figures: dict[str, Tensor]


def grpo_loss(logprobs: Tensor, tokens: Tokens, config: LossConfig, entropy: Tensor | None = None) -> LossResult:
    """Policy loss + kl_coef * KL - entropy_coef * entropy, each a weighted sum over tokens.

    logprobs [N]: of the sampled tokens under the weights being trained. entropy [N]: needed where entropy_coef is not
    0. Raises ValueError where the config asks for what is not given.
    """
    objective = config.objective
    each, clipped = policy_loss(logprobs, tokens, objective, config.dual_clip)
    if config.importance_cap is not None:
        each = each * importance_weights(tokens.old, tokens.rollout, config.importance_cap)
    total = (each * tokens.weights).sum()
    counted = tokens.weights != 0

    def summed(values: Tensor) -> Tensor:
        return torch.where(counted, values, 0).sum()

    figures = {
        "tokens": counted.sum(),
        "clip_frac": summed(clipped),
        "approx_kl": summed(tokens.old - logprobs.detach()),
    }
    if config.kl_coef:
        if tokens.ref is None:
            raise ValueError(f"kl_coef = {config.kl_coef}: needs the reference model's log-probabilities")
        penalty = kl_estimate(logprobs, tokens.ref, config.kl)
        total = total + config.kl_coef * (penalty * tokens.weights).sum()
        figures["kl"] = summed(kl_estimate(logprobs.detach(), tokens.ref, "k3"))
    if config.entropy_coef:
        if entropy is None:
            raise ValueError(f"entropy_coef = {config.entropy_coef}: needs the entropy of each token's distribution")
        total = total - config.entropy_coef * (entropy * tokens.weights).sum()
    if entropy is not None:
        figures["entropy"] = summed(entropy.detach())
    return LossResult(total, figures)


def policy_loss(
    logprobs: Tensor, tokens: Tokens, objective: Objective, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """(loss [N], clipped [N] bool): one term per token, before weighting; clipped = the clip took the gradient away."""
    advantages = tokens.advantages
    if objective.policy == "reinforce":
        return -advantages * logprobs, torch.zeros_like(logprobs, dtype=torch.bool)
    log_ratio = logprobs - tokens.old
    if objective.policy == "sequence-clip":
        log_ratio = sequence_mean(log_ratio, tokens.sequences, tokens.num_sequences)[tokens.sequences]
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    limited = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    if objective.policy == "clipped-weight":
        held = limited.detach()
        return -held * advantages * logprobs, held != ratio.detach()
    plain, bounded = -ratio * advantages, -limited * advantages
    each, clipped = torch.maximum(plain, bounded), (bounded > plain).detach()
    if dual_clip is not None:
        most = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        each, clipped = torch.minimum(each, most), clipped | (each > most).detach()
    return each, clipped


def sequence_mean(values: Tensor, sequences: Tensor, count: int) -> Tensor:
    """[N] -> [S]: the mean over each sequence's tokens, 0 for a sequence without any."""
    sums = values.new_zeros(count).index_add(0, sequences, values)
    sizes = values.new_zeros(count).index_add(0, sequences, torch.ones_like(values))
    return sums / sizes.clamp_min(1)


def kl_estimate(logprobs: Tensor, ref: Tensor, kind: KlKind) -> Tensor:
    """Per-token estimates [N] of KL(policy || reference) from the policy's own samples.

    With d = log ref - log policy: k1 = -d; k2 = d^2 / 2; k3 = e^d - d - 1 (never negative).
    """
    difference = (ref - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return -difference
    if kind == "k2":
        return 0.5 * difference.square()
    return difference.exp() - difference - 1


def importance_weights(old: Tensor, rollout: Tensor, cap: float) -> Tensor:
    """min(p_old / p_rollout, cap) [N], constant: what the trainer's numbers say against the engine's."""
    return (old - rollout).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


def mismatch_figures(trainer: Tensor, rollout: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """How far trainer and engine disagree on sampled tokens [N], N >= 1; sums over `mismatch/tokens` tokens, and a
    maximum.

    counted: bool [N]; the other tokens are left out. kl: k3 estimate of KL(rollout || trainer).
    """
    difference = torch.where(counted, trainer - rollout, 0).double()
    return {
        "mismatch/tokens": counted.sum(),
        "mismatch/kl": (difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - difference - 1).sum(),
        "mismatch/abs_diff": difference.abs().sum(),
        "mismatch/max": difference.abs().max(),
    }
