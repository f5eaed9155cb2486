"""Rows of scores on a GPU in two launches: statistics of each block of a row, then the block where the id lies.

With a truncation the statistics of all scores lead to the threshold, and those of what is kept follow.
Weights are relative to the best score of their block, in float32; their sums are float64. Runs on the CPU too, under
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.token_sample.levels import MAX_VOCABULARY
from vtengine_kernels.token_sample.threshold import threshold
from vtengine_kernels.token_sample.truncation import Truncation
from vtengine_kernels.triton_runtime import interpreted, launch, missing

MAX_BLOCK = 4096
NUM_WARPS = 8

if missing() is None:
    import triton
    import triton.language as tl

    # Suffixes: V a block of the vocabulary, P the blocks of a row.
    @triton.jit
    def _kept(x_V, at_V, row, least_ptr, last_ptr):
        """-inf in place of scores below the row's threshold; a NaN stays."""
        if least_ptr is not None:
            least = tl.load(least_ptr + row)
            is_cut_V = (x_V < least) | ((x_V == least) & (at_V > tl.load(last_ptr + row)))
            x_V = tl.where(is_cut_V, float("-inf"), x_V)
        return x_V

    @triton.jit
    def _blocks_kernel(
        scores_ptr, temperature_ptr, least_ptr, last_ptr, best_ptr, where_ptr, sum_ptr, row_stride, vocabulary,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Of each block: its best score, the first id that has it, the sum of its weights relative to the best."""
        row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
        v_V = part * BLOCK + tl.arange(0, BLOCK)
        end = vocabulary
        if least_ptr is not None:  # a block without a score that is kept is not read again
            end = tl.where(tl.load(best_ptr + row * parts + part) < tl.load(least_ptr + row), 0, vocabulary)
        x_V = tl.load(scores_ptr + row * row_stride + v_V, mask=v_V < end, other=float("-inf"))
        x_V = _kept(x_V, v_V, row, least_ptr, last_ptr)
        best, where = tl.max(x_V, axis=0, return_indices=True)
        below_V = x_V - tl.where(best == float("-inf"), 0.0, best)
        if temperature_ptr is not None:
            below_V = below_V / tl.load(temperature_ptr + row)
        weight_V = tl.exp(below_V)
        tl.store(best_ptr + row * parts + part, best)
        tl.store(where_ptr + row * parts + part, tl.minimum(part * BLOCK + where, vocabulary - 1))
        tl.store(sum_ptr + row * parts + part, tl.sum(weight_V.to(tl.float64), axis=0))

    @triton.jit
    def _pick_kernel(
        scores_ptr, temperature_ptr, least_ptr, last_ptr, draws_ptr, best_ptr, where_ptr, sum_ptr, ids_ptr,
        logprobs_ptr, row_stride, vocabulary, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        p_P = tl.arange(0, PARTS)
        in_P = p_P < parts
        best_P = tl.load(best_ptr + row * parts + p_P, mask=in_P, other=float("-inf"))
        sum_P = tl.load(sum_ptr + row * parts + p_P, mask=in_P, other=0.0)
        best, block = tl.max(best_P, axis=0, return_indices=True)
        temperature = 1.0 if temperature_ptr is None else tl.load(temperature_ptr + row)
        scale_P = tl.exp(((best_P - best) / temperature).to(tl.float64))
        mass_P = sum_P * scale_P
        log_total = tl.log(tl.sum(mass_P, axis=0))
        if draws_ptr is None:
            tl.store(ids_ptr + row, tl.load(where_ptr + row * parts + block).to(tl.int64))
            tl.store(logprobs_ptr + row, (-log_total).to(tl.float32))
        else:
            until_P = tl.cumsum(mass_P, axis=0)
            target = tl.load(draws_ptr + row) * tl.max(until_P, axis=0)
            # Where rounding leaves no sum beyond the target, the last block of some mass; below, the last id.
            block = tl.max(tl.where(mass_P > 0.0, p_P, 0), axis=0)
            block = tl.min(tl.where((until_P > target) & (mass_P > 0.0), p_P, block), axis=0)
            here_P = p_P == block
            before = tl.max(tl.where(p_P < block, until_P, 0.0), axis=0)
            rest = (target - before) / tl.sum(tl.where(here_P, scale_P, 0.0), axis=0)
            own = tl.max(tl.where(here_P, best_P, float("-inf")), axis=0)

            v_V = tl.arange(0, BLOCK)
            at_V = block * BLOCK + v_V
            x_V = tl.load(scores_ptr + row * row_stride + at_V, mask=at_V < vocabulary, other=float("-inf"))
            x_V = _kept(x_V, at_V, row, least_ptr, last_ptr)
            weight_V = tl.exp((x_V - own) / temperature).to(tl.float64)
            last = tl.max(tl.where(weight_V > 0.0, v_V, 0), axis=0)
            beyond_V = (tl.cumsum(weight_V, axis=0) > rest) & (weight_V > 0.0)
            found = tl.min(tl.where(beyond_V, v_V, last), axis=0)
            x = tl.max(tl.where(v_V == found, x_V, float("-inf")), axis=0)
            tl.store(ids_ptr + row, (block * BLOCK + found).to(tl.int64))
            tl.store(logprobs_ptr + row, (((x - best) / temperature).to(tl.float64) - log_total).to(tl.float32))


def takes(scores: Tensor) -> bool:
    return (scores.is_cuda or interpreted()) and scores.shape[1] <= MAX_VOCABULARY


def block_of(vocabulary: int) -> int:
    return min(MAX_BLOCK, max(16, 1 << (vocabulary - 1).bit_length()))


def token_sample(
    scores: Tensor, draws: Tensor | None, temperature: Tensor | None, truncation: Truncation | None
) -> tuple[Tensor, Tensor]:
    """Contract: the package's docstring."""
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    rows, vocabulary = scores.shape
    block = block_of(vocabulary)
    parts = -(-vocabulary // block)
    best, sums = (scores.new_empty((rows, parts), dtype=dtype) for dtype in (torch.float32, torch.float64))
    where = scores.new_empty((rows, parts), dtype=torch.int32)
    ids, logprobs = scores.new_empty(rows, dtype=torch.int64), scores.new_empty(rows)
    if not rows:
        return ids, logprobs
    if draws is not None and temperature is not None:
        draws, temperature = draws.contiguous(), temperature.contiguous()
    statistics, sizes = (best, where, sums), (scores.stride(0), vocabulary)
    limits: tuple[Tensor | None, Tensor | None] = (None, None)
    warps = NUM_WARPS if block == MAX_BLOCK else 4

    def count_blocks() -> None:
        grid, row = (rows, parts), (scores, temperature, *limits)
        launch(_blocks_kernel, grid, *row, *statistics, *sizes, BLOCK=block, num_warps=warps)

    count_blocks()
    if truncation is not None:
        assert temperature is not None
        limits = threshold(scores, temperature, truncation, best, sums, block)
        count_blocks()
    launch(
        _pick_kernel, (rows,), scores, temperature, *limits, draws, *statistics, ids, logprobs, *sizes, parts,
        PARTS=max(2, 1 << (parts - 1).bit_length()), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return ids, logprobs
