"""Rows of scores in plain torch, on any device: a block of rows at a time, so that what is in flight stays small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtengine_kernels.token_logprob.head import BANNED, Head
from vtengine_kernels.token_logprob.products import over

BLOCK_BYTES = {"cpu": 1 << 21}
OTHER_BLOCK_BYTES = 1 << 28


def missing() -> str | None:
    return None


def takes(hidden: Tensor) -> bool:
    return hidden.dtype != torch.float64


def statistics(scores: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """scores [C, V] as the products left them -> float32 [C]: logprobs of the targets, entropies, log-sum-exps."""
    logprobs, entropies, totals = torch.empty((3, len(scores)), device=scores.device)
    for rows in _blocks(scores):
        x = _bounded(scores[rows], head)[0]
        total = torch.logsumexp(x, dim=1)
        logprobs[rows] = x.gather(1, targets[rows, None])[:, 0] - total
        x -= total[:, None]
        entropies[rows] = -(x.exp() * x).sum(dim=1)
        totals[rows] = total
    return logprobs, entropies, totals


def gradients_(
    scores: Tensor, targets: Tensor, totals: Tensor, entropies: Tensor, slopes: tuple[Tensor, Tensor], head: Head
) -> Tensor:
    """The gradients of scores, over them. slopes: of the loss in logprobs and in entropies, float32 [C] each."""
    to_logprob, to_entropy = slopes
    into = over(scores, head.weight)
    for rows in _blocks(scores):
        x, bend = _bounded(scores[rows], head)
        x -= totals[rows, None]
        p = x.exp()
        x.add_(entropies[rows, None]).mul_(to_entropy[rows, None]).add_(to_logprob[rows, None]).mul_(p).neg_()
        x.scatter_add_(1, targets[rows, None], to_logprob[rows, None])
        x *= bend / head.temperature
        into[rows] = x
    return into


def _bounded(scores: Tensor, head: Head) -> tuple[Tensor, Tensor | float]:
    """(float32 copy after cap and temperature, the cap's derivative). Banned scores pass the cap as they are."""
    x = scores.to(torch.float32, copy=True)
    bend: Tensor | float = 1.0
    if head.soft_cap is not None:
        allowed = x > BANNED / 2
        share = (x / head.soft_cap).tanh()
        bend = 1 - share.square()
        x = torch.where(allowed, share * head.soft_cap, x)
    return x.div_(head.temperature), bend


def _blocks(scores: Tensor) -> Iterator[slice]:
    size = BLOCK_BYTES.get(scores.device.type, OTHER_BLOCK_BYTES) // (4 * scores.shape[1])
    for start in range(0, len(scores), max(1, size)):
        yield slice(start, start + max(1, size))
