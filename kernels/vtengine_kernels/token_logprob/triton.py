"""Rows of scores on a GPU: one program per row, two kernels. Runs on the CPU too, under TRITON_INTERPRET=1.

`row_statistics` and `row_gradients_` are shared with grpo_loss, whose kernel does both in one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.token_logprob.head import Head
from vtengine_kernels.token_logprob.products import over
from vtengine_kernels.triton_runtime import interpreted, launch, missing

MAX_BLOCK = 4096
NUM_WARPS = 8

if missing() is None:
    import triton
    import triton.language as tl

    # Suffix V: a block of the vocabulary. A score of at most -5e29 is a banned id's, and passes the cap as it is.
    @triton.jit
    def bounded(x_V, cold, cap, CAPPED: tl.constexpr):
        """(x after cap and temperature, the derivative). cold = 1 / temperature."""
        bend_V = cold
        if CAPPED:
            share_V = 2.0 * tl.sigmoid(x_V * (2.0 / cap)) - 1.0  # tanh
            bend_V = (1.0 - share_V * share_V) * cold
            x_V = tl.where(x_V > -5e29, share_V * cap, x_V)
        return x_V * cold, bend_V

    @triton.jit
    def row_statistics(row_ptr, target, vocabulary, cold, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
        """(logprob of the target, entropy, log-sum-exp) of one row, in one pass. BLOCK scores at a time are four lines
        of W: a thread keeps the sums of its own columns, and threads meet only at the end."""
        WIDTH: tl.constexpr = BLOCK // 4
        v_LW = tl.arange(0, 4)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        highest_W = tl.full((WIDTH,), -3.0e38, dtype=tl.float32)
        total_W = tl.zeros((WIDTH,), dtype=tl.float32)
        moment_W = tl.zeros((WIDTH,), dtype=tl.float32)  # sum of weight * (score - highest)
        for first in tl.range(0, vocabulary, BLOCK):
            in_LW = first + v_LW < vocabulary
            x_LW = tl.load(row_ptr + first + v_LW, mask=in_LW, other=float("-inf")).to(tl.float32)
            x_LW, _ = bounded(x_LW, cold, cap, CAPPED)
            new_W = tl.maximum(highest_W, tl.max(x_LW, axis=0))
            fade_W = tl.exp(highest_W - new_W)
            below_LW = x_LW - new_W[None, :]
            weight_LW = tl.exp(below_LW)
            moment_W = (moment_W + total_W * (highest_W - new_W)) * fade_W
            moment_W += tl.sum(tl.where(in_LW, weight_LW * below_LW, 0.0), axis=0)
            total_W = total_W * fade_W + tl.sum(weight_LW, axis=0)
            highest_W = new_W
        highest = tl.max(highest_W, axis=0)
        fade_W = tl.exp(highest_W - highest)
        total = tl.sum(total_W * fade_W, axis=0)
        moment = tl.sum((moment_W + total_W * (highest_W - highest)) * fade_W, axis=0)
        log_total = tl.log(total)
        own, _ = bounded(tl.load(row_ptr + target).to(tl.float32), cold, cap, CAPPED)
        return own - highest - log_total, log_total - moment / total, highest + log_total

    @triton.jit
    def row_gradients_(
        row_ptr, into_ptr, target, vocabulary, log_sum, entropy, to_logprob, to_entropy, cold, cap,
        NARROW: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The gradients of one row's scores, over them. NARROW: they have half the size, and overtake no block but the
        one that was read last."""
        v = tl.arange(0, BLOCK)
        tl.debug_barrier()  # all threads have read the target's score
        for first in range(0, vocabulary, BLOCK):
            in_V = first + v < vocabulary
            x_V = tl.load(row_ptr + first + v, mask=in_V, other=float("-inf")).to(tl.float32)
            x_V, bend_V = bounded(x_V, cold, cap, CAPPED)
            logp_V = x_V - log_sum
            p_V = tl.exp(logp_V)
            slope_V = -p_V * (to_logprob + to_entropy * (logp_V + entropy))
            slope_V += tl.where(first + v == target, to_logprob, 0.0)
            if NARROW:
                tl.debug_barrier()  # all threads have read the block
            tl.store(into_ptr + first + v, (slope_V * bend_V).to(into_ptr.dtype.element_ty), mask=in_V)

    @triton.jit
    def _statistics_kernel(
        scores_ptr, targets_ptr, logprobs_ptr, entropies_ptr, log_sums_ptr,
        row_stride, vocabulary, cold, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        logprob, entropy, log_sum = row_statistics(
            scores_ptr + row * row_stride, tl.load(targets_ptr + row), vocabulary, cold, cap, CAPPED, BLOCK
        )
        tl.store(logprobs_ptr + row, logprob)
        tl.store(entropies_ptr + row, entropy)
        tl.store(log_sums_ptr + row, log_sum)

    @triton.jit
    def _gradients_kernel(
        scores_ptr, into_ptr, targets_ptr, log_sums_ptr, entropies_ptr, to_logprob_ptr, to_entropy_ptr,
        row_stride, into_stride, vocabulary, cold, cap,
        NARROW: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        row_gradients_(
            scores_ptr + row * row_stride, into_ptr + row * into_stride, tl.load(targets_ptr + row), vocabulary,
            tl.load(log_sums_ptr + row), tl.load(entropies_ptr + row),
            tl.load(to_logprob_ptr + row), tl.load(to_entropy_ptr + row), cold, cap, NARROW, CAPPED, BLOCK,
        )  # fmt: skip


def takes(hidden: Tensor) -> bool:
    return (hidden.is_cuda or interpreted()) and hidden.dtype != torch.float64


def constants(head: Head) -> dict[str, int | bool]:
    """Compile-time arguments that every kernel of a head has, and how many warps run it."""
    block = min(MAX_BLOCK, max(16, 1 << (len(head.weight) - 1).bit_length()))
    return {"CAPPED": head.soft_cap is not None, "BLOCK": block, "num_warps": NUM_WARPS if block == MAX_BLOCK else 4}


def scalars(scores: Tensor, head: Head) -> tuple[int, float, float]:
    """Vocabulary, 1 / temperature, cap."""
    return scores.shape[1], 1.0 / head.temperature, head.soft_cap or 1.0


def statistics(scores: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """scores [C, V] as the products left them -> float32 [C]: logprobs of the targets, entropies, log-sum-exps."""
    out = torch.empty((3, len(scores)), device=scores.device)
    if len(scores):
        tensors = (scores, targets.contiguous(), *out)
        launch(
            _statistics_kernel, (len(scores),), *tensors, scores.stride(0), *scalars(scores, head), **constants(head)
        )
    return out[0], out[1], out[2]


def gradients_(
    scores: Tensor, targets: Tensor, totals: Tensor, entropies: Tensor, slopes: tuple[Tensor, Tensor], head: Head
) -> Tensor:
    """The gradients of scores, over them. slopes: of the loss in logprobs and in entropies, float32 [C] each."""
    into = over(scores, head.weight)
    if len(scores):
        tensors = (scores, into, targets.contiguous(), totals, entropies, *slopes)
        numbers = (scores.stride(0), into.stride(0), *scalars(scores, head))
        narrow = into.dtype != scores.dtype
        launch(_gradients_kernel, (len(scores),), *tensors, *numbers, NARROW=narrow, **constants(head))
    return into
