"""torch's own operations, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def missing() -> str | None:
    return None


def takes(scores: Tensor) -> bool:
    return True


def token_sample(scores: Tensor, draws: Tensor | None, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """Contract: the package's docstring."""
    if draws is None or temperature is None:
        best, ids = scores.max(dim=-1)
        return ids, best - scores.logsumexp(dim=-1)
    logprobs = (scores / temperature[:, None]).log_softmax(dim=-1)
    ids = _invert(logprobs.exp(), draws)
    return ids, logprobs.gather(1, ids[:, None])[:, 0]


def _invert(probs: Tensor, draws: Tensor) -> Tensor:
    """The first id whose cumulative probability exceeds the draw; never one of probability 0."""
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    target = draws[:, None].clamp(max=1 - 2.0**-52) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=probs.shape[1] - 1)
