"""Chunks of rows: products, then one pass over the scores; the scores of all rows never exist together.

`rows` is the module that works on scores: triton, native or eager, all with `statistics` and `gradients_`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vtengine_kernels.token_logprob.head import Head
from vtengine_kernels.token_logprob.products import Gradients, detached, empty_scores, scores_into


def token_logprob(hidden: Tensor, head: Head, targets: Tensor, chunk: int, rows: Any) -> tuple[Tensor, Tensor]:
    """Contract: the package's docstring; differentiable once. Backward computes the scores again: four products."""
    tensors = (hidden, *head.tensors)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        logprobs, entropies = _TokenLogprob.apply(*tensors, head, targets, chunk, rows)
    else:
        logprobs, entropies, _ = statistics(hidden, head, targets, chunk, rows)
    return logprobs, entropies


def statistics(hidden: Tensor, head: Head, targets: Tensor, chunk: int, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [N] each: logprobs, entropies, log-sum-exps. No gradients."""
    found = torch.empty((3, len(hidden)), device=hidden.device)
    room = empty_scores(min(chunk, len(hidden)), head.weight)
    for part in parts(len(hidden), chunk):
        scores = scores_into(room[: part.stop - part.start], hidden[part], head)
        for into, values in zip(found, rows.statistics(scores, targets[part], head), strict=True):
            into[part] = values
    return found[0], found[1], found[2]


def parts(count: int, chunk: int) -> Iterator[slice]:
    """0 .. count - 1 in pieces of at most `chunk`."""
    for start in range(0, count, chunk):
        yield slice(start, min(start + chunk, count))


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None,
        head: Head, targets: Tensor, chunk: int, rows: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        head = detached(head, weight, a, b)
        logprobs, entropies, totals = statistics(hidden, head, targets, chunk, rows)
        ctx.save_for_backward(hidden, weight, a, b, targets, totals, entropies)
        ctx.settings = (head, chunk, rows)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_logprobs: Tensor, to_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, a, b, targets, totals, entropies = ctx.saved_tensors
        head, chunk, rows = ctx.settings
        head = detached(head, weight, a, b)
        pieces = list(parts(len(hidden), chunk))
        gradients = Gradients(hidden, head, ctx.needs_input_grad[:4], len(pieces))
        room = empty_scores(min(chunk, len(hidden)), weight)
        for part in pieces:
            scores = scores_into(room[: part.stop - part.start], hidden[part], head)
            slopes = (to_logprobs[part].contiguous(), to_entropies[part].contiguous())
            rows.gradients_(scores, targets[part], totals[part], entropies[part], slopes, head)
            gradients.add(part, hidden[part], scores)
        return *gradients.tensors(), None, None, None, None
