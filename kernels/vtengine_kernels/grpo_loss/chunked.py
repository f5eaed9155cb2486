"""The loss and its gradients in one forward pass: per chunk one product for the scores, one pass that turns scores into
their gradients, two products from those. A sequence ratio needs all logprobs first: the scores are computed twice, but
for those of the last chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vtengine_kernels.grpo_loss import triton
from vtengine_kernels.grpo_loss.objective import Objective, Tokens, losses_and_slopes
from vtengine_kernels.token_logprob import triton as token_triton
from vtengine_kernels.token_logprob.chunked import parts, room_for, statistics
from vtengine_kernels.token_logprob.head import Head
from vtengine_kernels.token_logprob.products import Gradients, detached, scores_into


def grpo_loss(
    hidden: Tensor, head: Head, targets: Tensor, tokens: Tokens, objective: Objective, chunk: int, rows: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Contract: the package's docstring. `rows` works on scores: token_logprob's triton, native or eager."""
    tensors = (hidden, *head.tensors)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        total, logprobs, entropies = _Loss.apply(*tensors, head, targets, tokens, objective, chunk, rows)
        return total, logprobs, entropies
    (logprobs, entropies, _), _ = statistics(hidden, head, targets, parts(len(hidden), chunk), rows)
    return _total(logprobs, entropies, tokens, objective), logprobs, entropies


def _total(logprobs: Tensor, entropies: Tensor, tokens: Tokens, objective: Objective) -> Tensor:
    return losses_and_slopes(logprobs, entropies, tokens, objective)[0].sum(dtype=torch.float64).float()


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None,
        head: Head, targets: Tensor, tokens: Tokens, objective: Objective, chunk: int, rows: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        head = detached(head, weight, a, b)
        pieces = parts(len(hidden), chunk)
        gradients = Gradients(hidden, head, ctx.needs_input_grad[:4], len(pieces))
        work = _by_sequence if objective.policy == "sequence-clip" else _by_token
        logprobs, entropies = work(hidden, head, targets, tokens, objective, pieces, rows, gradients)
        ctx.gradients = gradients.tensors()
        ctx.mark_non_differentiable(logprobs, entropies)
        return _total(logprobs, entropies, tokens, objective), logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "grpo_loss: the gradients were handed over by the first backward; compute the loss again"
            )
        # Handed over, not kept: with a second reference, autograd would copy a gradient as large as the weight.
        gradients, ctx.gradients = ctx.gradients, None
        if float(to_total) != 1:
            gradients = tuple(None if gradient is None else gradient.mul_(to_total) for gradient in gradients)
        return *gradients, None, None, None, None, None, None


def _by_token(
    hidden: Tensor, head: Head, targets: Tensor, tokens: Tokens, objective: Objective,
    pieces: list[slice], rows: Any, gradients: Gradients,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Three products per chunk."""
    logprobs, entropies = torch.empty((2, len(hidden)), device=hidden.device)
    room = room_for(pieces, head)
    for part in pieces:
        scores = scores_into(room[: part.stop - part.start], hidden[part], head)
        own, mine = targets[part], tokens.pick(part)
        if rows is token_triton:
            logprobs[part], entropies[part], of_scores = triton.gradients_(scores, own, head, mine, objective)
        else:
            logprobs[part], entropies[part], totals = rows.statistics(scores, own, head)
            slopes = losses_and_slopes(logprobs[part], entropies[part], mine, objective)[1:]
            of_scores = rows.gradients_(scores, own, totals, entropies[part], slopes, head)
        gradients.add(part, hidden[part], of_scores)
    return logprobs, entropies


def _by_sequence(
    hidden: Tensor, head: Head, targets: Tensor, tokens: Tokens, objective: Objective,
    pieces: list[slice], rows: Any, gradients: Gradients,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All logprobs first, then backwards through the chunks: the last one's scores are still there."""
    room = room_for(pieces, head)
    (logprobs, entropies, totals), scores = statistics(hidden, head, targets, pieces, rows, room)
    to_logprob, to_entropy = losses_and_slopes(logprobs, entropies, tokens, objective)[1:]
    for part in reversed(pieces):
        if part is not pieces[-1]:
            scores = scores_into(room[: part.stop - part.start], hidden[part], head)
        slopes = (to_logprob[part], to_entropy[part])
        of_scores = rows.gradients_(scores, targets[part], totals[part], entropies[part], slopes, head)
        gradients.add(part, hidden[part], of_scores)
    return logprobs, entropies
