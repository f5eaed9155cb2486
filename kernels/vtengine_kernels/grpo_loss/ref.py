"""The reference: the loss written as it is defined, on the logprobs of all tokens; torch's own gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.grpo_loss.objective import MAX_LOG_RATIO, Objective, Tokens


def total(logprobs: Tensor, entropies: Tensor, tokens: Tokens, objective: Objective) -> Tensor:
    """float32 or float64 [N] both -> the sum over tokens of weight x loss, a scalar of the same dtype."""
    terms = policy_terms(logprobs, tokens, objective)
    if objective.kl_coef:
        assert tokens.ref is not None
        d = (tokens.ref - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        terms = terms + objective.kl_coef * {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[objective.kl]
    if objective.entropy_coef:
        terms = terms - objective.entropy_coef * entropies
    return (terms * tokens.weights).sum()


def policy_terms(logprobs: Tensor, tokens: Tokens, objective: Objective) -> Tensor:
    """One term per token, before its weight."""
    advantages = tokens.advantages
    old = logprobs.detach() if tokens.old is None else tokens.old
    log_ratio = logprobs - old
    if objective.policy == "sequence-clip":
        assert tokens.sequences is not None
        member = torch.nn.functional.one_hot(tokens.sequences, tokens.num_sequences).to(logprobs.dtype)
        log_ratio = member @ ((member.t() @ log_ratio) / member.sum(0).clamp_min(1))
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    limited = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    if objective.policy == "reinforce":
        terms = -advantages * logprobs
    elif objective.policy == "clipped-weight":
        terms = -limited.detach() * advantages * logprobs
    else:
        terms = -torch.minimum(ratio * advantages, limited * advantages)
        if objective.dual_clip is not None:
            floor = -objective.dual_clip * advantages
            terms = torch.where(advantages < 0, torch.minimum(terms, floor), terms)
    if objective.importance_cap is not None:
        assert tokens.rollout is not None
        drift = (old - tokens.rollout).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        terms = terms * drift.exp().clamp(max=objective.importance_cap)
    return terms
