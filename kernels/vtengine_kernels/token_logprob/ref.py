"""The reference: all scores at once, and torch's own gradients. Works in the dtype of the hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.token_logprob.head import BANNED, Head


def missing() -> str | None:
    return None


def takes(hidden: Tensor) -> bool:
    return True


def scores(hidden: Tensor, head: Head) -> Tensor:
    """[N, V]: after cap, temperature and bans; at least float32."""
    out = hidden @ head.weight.t()
    if head.low_rank is not None:
        a, b = head.low_rank.a.to(hidden.dtype), head.low_rank.b.to(hidden.dtype)
        out = out + head.low_rank.scale * (hidden @ a.t() @ b.t())
    if out.dtype != torch.float64:
        out = out.float()
    if head.soft_cap is not None:
        out = head.soft_cap * (out / head.soft_cap).tanh()
    out = out / head.temperature
    return out if head.banned is None else out.index_fill(1, head.banned, BANNED)


def token_logprob(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Contract: the package's docstring."""
    logprobs = scores(hidden, head).log_softmax(dim=1)
    entropies = -(logprobs.exp() * logprobs.clamp(min=BANNED)).sum(dim=1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropies
