"""torch's own operations, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.token_sample.truncation import Truncation


def missing() -> str | None:
    return None


def takes(scores: Tensor) -> bool:
    return True


def token_sample(
    scores: Tensor, draws: Tensor | None, temperature: Tensor | None, truncation: Truncation | None
) -> tuple[Tensor, Tensor]:
    """Contract: the package's docstring."""
    if draws is None or temperature is None:
        best, ids = scores.max(dim=-1)
        return ids, best - scores.logsumexp(dim=-1)
    if truncation is not None:
        scores = _truncated(scores, temperature, truncation)
    logprobs = (scores / temperature[:, None]).log_softmax(dim=-1)
    ids = _invert(logprobs.exp(), draws)
    return ids, logprobs.gather(1, ids[:, None])[:, 0]


def _truncated(scores: Tensor, temperature: Tensor, truncation: Truncation) -> Tensor:
    """-inf in place of what is not kept; a NaN ranks first and stays."""
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    probs = (ranked / temperature[:, None]).masked_fill(ranks >= truncation.top_k[:, None], -torch.inf).softmax(dim=-1)
    before = probs.cumsum(dim=-1, dtype=torch.float64) - probs
    drop = (before >= truncation.top_p.double()[:, None]) & (truncation.top_p < 1)[:, None]
    drop |= (ranks >= truncation.top_k[:, None]) | (probs < truncation.min_p[:, None] * probs[:, :1])
    drop[:, 0] = False
    return scores.masked_fill(torch.empty_like(drop).scatter_(1, order, drop), -torch.inf)


def _invert(probs: Tensor, draws: Tensor) -> Tensor:
    """The first id whose cumulative probability exceeds the draw; never one of probability 0."""
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    target = draws[:, None].clamp(max=1 - 2.0**-52) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=probs.shape[1] - 1)
