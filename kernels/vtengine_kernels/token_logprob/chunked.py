"""Chunks of rows: products, then one pass over the scores; the scores of all rows never exist together.

`rows` is the module that works on scores: triton, native or eager, all with `statistics` and `gradients_`.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        (logprobs, entropies, _), _ = statistics(hidden, head, targets, parts(len(hidden), chunk), rows)
    return logprobs, entropies


def statistics(
    hidden: Tensor, head: Head, targets: Tensor, pieces: Sequence[slice], rows: Any, room: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(float32 [3, N]: logprobs, entropies, log-sum-exps; the last piece's scores, in `room`). No gradients."""
    found = torch.empty((3, len(hidden)), device=hidden.device)
    scores = room = room_for(pieces, head) if room is None else room
    for part in pieces:
        scores = scores_into(room[: part.stop - part.start], hidden[part], head)
        for into, values in zip(found, rows.statistics(scores, targets[part], head), strict=True):
            into[part] = values
    return found, scores


def parts(count: int, chunk: int) -> list[slice]:
    """0 .. count - 1 in pieces of at most `chunk`."""
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


def room_for(pieces: Sequence[slice], head: Head) -> Tensor:
    """Room for the scores of the largest piece."""
    return empty_scores(pieces[0].stop if pieces else 0, head.weight)


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None,
        head: Head, targets: Tensor, chunk: int, rows: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        head = detached(head, weight, a, b)
        (logprobs, entropies, totals), _ = statistics(hidden, head, targets, parts(len(hidden), chunk), rows)
        ctx.save_for_backward(hidden, weight, a, b, targets, totals, entropies)
        ctx.settings = (head, chunk, rows)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_logprobs: Tensor, to_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, a, b, targets, totals, entropies = ctx.saved_tensors
        head, chunk, rows = ctx.settings
        head = detached(head, weight, a, b)
        pieces = parts(len(hidden), chunk)
        gradients = Gradients(hidden, head, ctx.needs_input_grad[:4], len(pieces))
        room = room_for(pieces, head)
        for part in pieces:
            scores = scores_into(room[: part.stop - part.start], hidden[part], head)
            slopes = (to_logprobs[part].contiguous(), to_entropies[part].contiguous())
            of_scores = rows.gradients_(scores, targets[part], totals[part], entropies[part], slopes, head)
            gradients.add(part, hidden[part], of_scores)
        return *gradients.tensors(), None, None, None, None
