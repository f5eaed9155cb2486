"""The reference: the distribution in float64, a row at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def missing() -> str | None:
    return None


def takes(scores: Tensor) -> bool:
    return True


def token_sample(scores: Tensor, draws: Tensor | None, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """Contract: the package's docstring."""
    exact = scores.double() if temperature is None else scores.double() / temperature.double()[:, None]
    logprobs = exact.log_softmax(dim=1)
    ids = [int(row.argmax()) if draws is None else _first(row.exp(), float(draws[n])) for n, row in enumerate(logprobs)]
    found = torch.tensor(ids, dtype=torch.int64, device=scores.device)
    return found, logprobs.gather(1, found[:, None])[:, 0].float()


def _first(probs: Tensor, draw: float) -> int:
    beyond = (probs.cumsum(0) > draw) & (probs > 0)
    return int(beyond.int().argmax() if beyond.any() else (probs > 0).nonzero().max()) if (probs > 0).any() else 0
