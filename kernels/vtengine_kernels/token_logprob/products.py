"""The matrix products of a head, a chunk of rows at a time: scores, and what their gradients mean for the inputs.

Scores are float32 whatever the weight: rounded to bfloat16 they would move a loss by some 1e-3. Their gradients are
rounded to the dtype of the weight, where products run in it. On CUDA cuBLAS takes 16-bit operands and gives float32. On
the CPU float32 runs as it is, by MKL or oneDNN; a 16-bit weight is widened a slice of the vocabulary at a time, unless
the processor multiplies bfloat16 itself. Gradients of the weight add up in float32 over the chunks.
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
    """Whether this processor has bfloat16 products in hardware, and torch's add up to more than they round to."""
    if not any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile")):
        return False
    left, right = torch.ones(2, 64, 257, dtype=torch.bfloat16)
    with torch.inference_mode():
        return bool((_product_of_16_bits(left, right) == 257).all())  # as bfloat16: 256


def operand_dtype(weight: Tensor) -> torch.dtype:
    """Of both operands of the products."""
    native = weight.device.type != "cpu" or (weight.dtype == torch.bfloat16 and multiplies_bfloat16())
    return weight.dtype if native else torch.float32


def empty_scores(rows: int, weight: Tensor) -> Tensor:
    """Room for the scores of a chunk, float32 [rows, V]."""
    return torch.empty((rows, len(weight)), device=weight.device)


def over(scores: Tensor, weight: Tensor) -> Tensor:
    """Where the gradients of scores go: over them, in the dtype of the products. 16-bit ones take the first half of
    the memory of their row, so a row must be read before what is written reaches it."""
    dtype = operand_dtype(weight)
    return scores if dtype == scores.dtype else scores.view(dtype)[:, : scores.shape[1]]


def scores_into(room: Tensor, hidden: Tensor, head: Head) -> Tensor:
    """hidden [C, H] -> float32 [C, V]: hidden @ weight.T with the low-rank term and the bans; no cap, no temperature.

    The result is `room`, or newer memory where the library gives no choice.
    """
    weight, states = head.weight, hidden.to(operand_dtype(head.weight))
    if weight.dtype != room.dtype and weight.is_cuda:
        torch.mm(states, weight.t(), out_dtype=room.dtype, out=room)
    elif weight.dtype != states.dtype:
        for part in _slices(weight):
            torch.mm(states, weight[part].to(states.dtype).t(), out=room[:, part])
    elif weight.dtype != room.dtype:
        for part in _slices(weight):
            room[:, part] = _product_of_16_bits(states, weight[part])
    elif _by_onednn(states, weight):
        room = product(states, weight)
    else:
        torch.mm(states, weight.t(), out=room)
    if head.low_rank is not None:
        a, b = head.low_rank.a.to(room.dtype), head.low_rank.b.to(room.dtype)
        room.addmm_(hidden.to(room.dtype) @ a.t(), b.t(), alpha=head.low_rank.scale)
    return room if head.banned is None else room.index_fill_(1, head.banned, BANNED)


def _product_of_16_bits(left: Tensor, right: Tensor) -> Tensor:
    """left [A, C] @ right [B, C].T, 16 bits each, to about 18, though torch gives 8 on the CPU: once more less the
    rounded product, the sum in float32 leaves what the rounding dropped."""
    rounded = left @ right.t()
    dropped = torch.addmm(rounded, left, right.t(), beta=-1)
    return rounded.float().add_(dropped)


class Gradients:
    """Of hidden [N, H], weight [V, H], a [R, H] and b [V, R], each only if wanted, from those of the scores."""

    def __init__(self, hidden: Tensor, head: Head, wanted: tuple[bool, bool, bool, bool], chunks: int) -> None:
        self.head = head
        self.dtype = operand_dtype(head.weight)
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
        """scores [C, V]: gradients of the scores of hidden[rows] [C, H], in the dtype of the products; those of banned
        ids become 0 in place."""
        if self.head.banned is not None:
            scores.index_fill_(1, self.head.banned, 0.0)
        hidden = hidden.to(self.dtype)
        if self.hidden is not None:
            self.hidden[rows] = _times_weight(scores, self.head.weight)
        if self.weight is not None:
            at_once = self.weight.is_cuda or self.weight.dtype == scores.dtype
            for part in (slice(None),) if at_once else _slices(self.weight):
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
        if self.first and total.dtype == left.dtype:
            torch.mm(left.t(), right, out=total)  # oneDNN's product, which cannot add or be told where, takes longer
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


def _by_onednn(operand: Tensor, weight: Tensor) -> bool:
    return operand.device.type == "cpu" and operand.dtype == torch.float32 and onednn_is_better(weight)


def _times_weight(scores: Tensor, weight: Tensor) -> Tensor:
    if scores.dtype == weight.dtype:
        return product(scores, weight.t()) if _by_onednn(scores, weight) else scores @ weight
    total = scores.new_zeros(len(scores), weight.shape[1])
    for part in _slices(weight):
        total.addmm_(scores[:, part], weight[part].to(scores.dtype))
    return total


def _slices(weight: Tensor) -> Iterator[slice]:
    """The vocabulary in parts of which a copy is small."""
    vocabulary, size = weight.shape
    step = max(1, SLICE_ELEMENTS // size)
    for start in range(0, vocabulary, step):
        yield slice(start, min(start + step, vocabulary))
