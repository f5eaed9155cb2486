"""grpo_loss: the policy-gradient losses of GRPO and its relatives, from hidden states to gradients.

The gradients are formed in the forward pass, chunk by chunk, so that scores over the vocabulary are computed once:
three matrix products per step, as the plain head takes, and no tensor of all rows times the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtengine_kernels.dispatch import select
from vtengine_kernels.grpo_loss import chunked, ref
from vtengine_kernels.grpo_loss.objective import MAX_LOG_RATIO, Objective, Tokens
from vtengine_kernels.token_logprob import ROWS, WHOLE, Head, Impl, LowRank
from vtengine_kernels.token_logprob.head import check, check_ids

__all__ = ["MAX_LOG_RATIO", "Head", "Impl", "Loss", "LowRank", "Objective", "Tokens", "grpo_loss"]


@dataclass(frozen=True, eq=False)
class Loss:
    """total: the scalar to differentiate, once. logprobs, entropies: [N], without gradients."""

    total: Tensor
    logprobs: Tensor
    entropies: Tensor


def grpo_loss(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    tokens: Tokens,
    objective: Objective,
    *,
    mask: Tensor | None = None,
    chunk: int = 1024,
    impl: Impl = "auto",
) -> Loss:
    """hidden [N, H], targets int64 [N], `tokens` of N tokens, mask bool [N] -> sum over tokens of weight x loss.

    A token's loss: its policy term, + kl_coef * KL estimate, - entropy_coef * entropy (see `Objective`); how the tokens
    add up is in their weights. dtypes, mask, chunk, impl and what NaN does: as in `token_logprob`. Gradients reach
    hidden, head.weight and the low-rank factors, each only if it wants them; masked rows get exactly 0. Differentiable
    once: a second backward is a RuntimeError. "sequence-clip" computes the scores of all but one chunk twice.
    ValueError: what does not fit, or what the objective needs and `tokens` lack.
    """
    check(hidden, head, targets, mask, chunk)
    _check_tokens(tokens, objective, hidden)
    rows = select("grpo_loss", impl, ROWS, hidden)
    if mask is None:
        return _run(rows, hidden, head, targets, tokens, objective, chunk)
    kept = mask.nonzero()[:, 0]
    part = _run(rows, hidden[kept], head, targets[kept], tokens.pick(kept), objective, chunk)
    logprobs, entropies = (x.new_zeros(len(mask)).index_copy(0, kept, x) for x in (part.logprobs, part.entropies))
    return Loss(part.total, logprobs, entropies)


def _run(
    rows: Any, hidden: Tensor, head: Head, targets: Tensor, tokens: Tokens, objective: Objective, chunk: int
) -> Loss:
    if rows in WHOLE:
        logprobs, entropies = rows.token_logprob(hidden, head, targets)
        total = ref.total(logprobs, entropies, tokens, objective)
        return Loss(total, logprobs.detach(), entropies.detach())
    return Loss(*chunked.grpo_loss(hidden, head, targets, tokens, objective, chunk, rows))


def _check_tokens(tokens: Tokens, objective: Objective, hidden: Tensor) -> None:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    for name in ("advantages", "weights", "old", "rollout", "ref"):
        values = getattr(tokens, name)
        if values is not None:
            _check_one(name, values, dtype, hidden)
    needs = (
        ("ref", bool(objective.kl_coef), f"kl_coef = {objective.kl_coef}"),
        ("rollout", objective.importance_cap is not None, f"importance_cap = {objective.importance_cap}"),
        ("sequences", objective.policy == "sequence-clip", "policy = 'sequence-clip'"),
    )
    for name, wanted, setting in needs:
        if wanted and getattr(tokens, name) is None:
            raise ValueError(f"{setting}: needs tokens.{name}")
    if objective.policy == "sequence-clip" and tokens.sequences is not None:
        _check_one("sequences", tokens.sequences, torch.int64, hidden)
        check_ids("tokens.sequences", tokens.sequences, tokens.num_sequences)


def _check_one(name: str, values: Tensor, dtype: torch.dtype, hidden: Tensor) -> None:
    if values.dtype != dtype or values.shape != hidden.shape[:1] or values.device != hidden.device:
        raise ValueError(
            f"tokens.{name} {values.dtype} {list(values.shape)} on {values.device}: must be {dtype} "
            f"[{len(hidden)}] on {hidden.device}"
        )
