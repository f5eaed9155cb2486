"""The matrix products of a head, a chunk of rows at a time: scores, and what their gradients mean for the inputs.

On CUDA, cuBLAS in the dtype of the weight. On the CPU float32 runs as it is, by MKL or oneDNN; 16-bit weights are
widened a slice of the vocabulary at a time, unless the processor multiplies bfloat16 itself.
Gradients of the weight add up in float32 over the chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from vtengine_kernels.onednn import onednn_is_better, product
from vtengine_kernels.token_logprob.head import BANNED, Head

SLICE_ELEMENTS = 1 << 23


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 products in hardware."""
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def working_dtype(weight: Tensor) -> torch.dtype:
    """Of the scores, and of both operands of the products."""
    native = weight.device.type != "cpu" or (weight.dtype == torch.bfloat16 and multiplies_bfloat16())
    return weight.dtype if native else torch.float32


def empty_scores(rows: int, weight: Tensor) -> Tensor:
    """Room for the scores of a chunk, [rows, V]."""
    return torch.empty((rows, len(weight)), dtype=working_dtype(weight), device=weight.device)


def scores_into(room: Tensor, hidden: Tensor, head: Head) -> Tensor:
    """hidden [C, H] -> [C, V]: hidden @ weight.T with the low-rank term and the bans; no cap, no temperature.

    The result is `room`, or newer memory where the library gives no choice.
    """
    hidden = hidden.to(room.dtype)
    if _by_onednn(room):
        room = product(hidden, head.weight)
    else:
        for part, weight in _slices(head.weight):
            torch.mm(hidden, weight.t(), out=room[:, part])
    if head.low_rank is not None:
        a, b = head.low_rank.a.to(room.dtype), head.low_rank.b.to(room.dtype)
        room.addmm_(hidden @ a.t(), b.t(), alpha=head.low_rank.scale)
    return room if head.banned is None else room.index_fill_(1, head.banned, BANNED)


class Gradients:
    """Of hidden [N, H], weight [V, H], a [R, H] and b [V, R], each only if wanted, from those of the scores."""

    def __init__(self, hidden: Tensor, head: Head, wanted: tuple[bool, bool, bool, bool], chunks: int) -> None:
        self.head = head
        self.dtype = working_dtype(head.weight)
        inputs = (hidden, *head.tensors)
        totals: list[Tensor | None] = [None] * 4
        for index, (tensor, want) in enumerate(zip(inputs, wanted, strict=True)):
            if tensor is not None and want:
                summed = index > 0 and chunks != 1
                dtype = torch.float32 if summed else tensor.dtype
                totals[index] = (torch.zeros if chunks == 0 else torch.empty)(
                    tensor.shape, dtype=dtype, device=tensor.device
                )
        self.hidden, self.weight, self.a, self.b = totals
        self.first = True

    def add(self, rows: slice, hidden: Tensor, scores: Tensor) -> None:
        """scores [C, V]: gradients of the scores of hidden[rows] [C, H], in the working dtype; those of banned ids
        become 0 in place."""
        if self.head.banned is not None:
            scores.index_fill_(1, self.head.banned, 0.0)
        hidden = hidden.to(self.dtype)
        if self.hidden is not None:
            self.hidden[rows] = _times_weight(scores, self.head.weight)
        if self.weight is not None:
            for part in _parts(self.head.weight, sliced=_by_onednn(scores) and not self.first):
                self._outer(self.weight[part], scores[:, part], hidden)
        if self.head.low_rank is not None:
            self._add_low_rank(rows, hidden, scores)
        self.first = False

    def _add_low_rank(self, rows: slice, hidden: Tensor, scores: Tensor) -> None:
        assert self.head.low_rank is not None
        a, b = self.head.low_rank.a.to(self.dtype), self.head.low_rank.b.to(self.dtype)
        inner = (scores @ b).mul_(self.head.low_rank.scale)
        if self.hidden is not None:
            self.hidden[rows] += inner @ a
        if self.a is not None:
            self._outer(self.a, inner, hidden)
        if self.b is not None:
            self._outer(self.b, scores, (hidden @ a.t()).mul_(self.head.low_rank.scale))

    def _outer(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """total [A, B] (+)= left [C, A].T @ right [C, B]."""
        if _by_onednn(left):
            made = product(left.t(), right.t())
            total.copy_(made) if self.first else total.add_(made)
        elif self.first and total.dtype == left.dtype:
            torch.mm(left.t(), right, out=total)
        elif self.first and left.is_cuda:
            torch.mm(left.t(), right, out_dtype=total.dtype, out=total)
        elif self.first:
            total.copy_(left.t() @ right)
        elif total.dtype == left.dtype:
            total.addmm_(left.t(), right)
        elif left.is_cuda:  # 16-bit operands, float32 sums, in one pass
            torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
        else:
            total += left.t() @ right

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """In the dtypes of the inputs."""
        weight, a, b = (
            total if total is None or tensor is None else total.to(tensor.dtype)
            for total, tensor in zip((self.weight, self.a, self.b), self.head.tensors, strict=True)
        )
        return self.hidden, weight, a, b


def detached(head: Head, weight: Tensor, a: Tensor | None, b: Tensor | None) -> Head:
    """The head with these tensors in the place of its own."""
    low_rank = head.low_rank
    if low_rank is not None and a is not None and b is not None:
        low_rank = replace(low_rank, a=a.detach(), b=b.detach())
    return replace(head, weight=weight.detach(), low_rank=low_rank)


def _by_onednn(operand: Tensor) -> bool:
    return operand.device.type == "cpu" and operand.dtype == torch.float32 and onednn_is_better()


def _times_weight(scores: Tensor, weight: Tensor) -> Tensor:
    if _by_onednn(scores) and weight.dtype == torch.float32:
        return product(scores, weight.t())
    total: Tensor | None = None
    for part, rows in _slices(weight):
        total = scores[:, part] @ rows if total is None else total.addmm_(scores[:, part], rows)
    assert total is not None
    return total


def _slices(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight in the working dtype: whole if that is its own, else slice by slice."""
    dtype = working_dtype(weight)
    for part in _parts(weight, sliced=dtype != weight.dtype):
        yield part, weight[part].to(dtype)


def _parts(weight: Tensor, *, sliced: bool) -> Iterator[slice]:
    vocabulary = len(weight)
    step = max(1, SLICE_ELEMENTS // weight.shape[1]) if sliced or working_dtype(weight) != weight.dtype else vocabulary
    for start in range(0, vocabulary, step):
        yield slice(start, min(start + step, vocabulary))
