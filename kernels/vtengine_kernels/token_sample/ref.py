"""The reference: the distribution in float64, a row at a time."""

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
    exact = scores.double() if temperature is None else scores.double() / temperature.double()[:, None]
    if truncation is not None:
        for n, row in enumerate(exact):
            top_k, top_p, min_p = (x[n].item() for x in (truncation.top_k, truncation.top_p, truncation.min_p))
            row[~kept(scores[n], row.softmax(0), int(top_k), top_p, min_p)] = -torch.inf
    logprobs = exact.log_softmax(dim=1)
    ids = [int(row.argmax()) if draws is None else _first(row.exp(), float(draws[n])) for n, row in enumerate(logprobs)]
    found = torch.tensor(ids, dtype=torch.int64, device=scores.device)
    return found, logprobs.gather(1, found[:, None])[:, 0].float()


def kept(scores: Tensor, probs: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """scores [V], probs float64 [V] -> bool [V]: what is kept. Of a row that is not finite: everything."""
    keep = torch.ones_like(probs, dtype=torch.bool)
    if probs.isnan().any():
        return keep
    ranked = scores.argsort(descending=True, stable=True)
    keep[ranked[top_k:]] = False
    best_first = probs[ranked[:top_k]]
    if top_p < 1:
        before = best_first.cumsum(0) - best_first
        keep[ranked[:top_k][before >= top_p * best_first.sum()]] = False
    return keep & (probs >= min_p * probs.max())


def _first(probs: Tensor, draw: float) -> int:
    beyond = (probs.cumsum(0) > draw) & (probs > 0)
    return int(beyond.int().argmax() if beyond.any() else (probs > 0).nonzero().max()) if (probs > 0).any() else 0
