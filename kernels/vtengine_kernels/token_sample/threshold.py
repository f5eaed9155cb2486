"""The least score that a truncation keeps, on a GPU, without a sort: four launches after the statistics of blocks.

Two find the levels of each row around the threshold (levels.py). The scores between them are brought together and
halved until one is left. Suffixes: V a block of the vocabulary, P the blocks of a row, C a part of what is searched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vtengine_kernels.token_sample.levels import EVEN, LEVELS, SAMPLE
from vtengine_kernels.triton_runtime import launch, missing

if TYPE_CHECKING:
    from torch import Tensor

    from vtengine_kernels.token_sample.truncation import Truncation

CAPACITY = 1 << 15  # scores of a row that are brought together; of more (the sample misled) the row itself is searched
CHUNK = 4096
NUM_WARPS = 8
SEARCH_WARPS = 16  # of a program that works on a row alone

if missing() is None:
    import triton
    import triton.language as tl

    from vtengine_kernels.token_sample.levels import (
        band_keys,
        bands,
        key_of,
        levels_kernel,
        mass_of,
        row_best,
        score_of,
        total_of,
        totals_kernel,
    )

    NONE: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # above the key of every score
    LOWEST: tl.constexpr = tl.constexpr(-0x7F800001)  # the key of -inf

    @triton.jit
    def _gather_kernel(
        scores_ptr, temperature_ptr, top_k_ptr, top_p_ptr, best_ptr, levels_ptr, totals_ptr, found_ptr, row_stride,
        vocabulary,
        CAPACITY: tl.constexpr, PARTS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Brings the scores of the bands together, in any order, and counts them; not those of a band of equal ones."""
        row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
        top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
        if (top_k < vocabulary) | (top_p < 1.0):
            best, temperature = row_best(best_ptr, row, parts, PARTS), tl.load(temperature_ptr + row)
            of_k, low, high = bands(levels_ptr, totals_ptr, row, top_k, top_p, best, temperature, vocabulary, LEVELS)
            k_bottom, k_top = band_keys(levels_ptr, row, of_k, of_k - 1, best, LEVELS)
            p_bottom, p_top = band_keys(levels_ptr, row, low, high, best, LEVELS)
            k_bottom = tl.where((top_k < vocabulary) & (k_bottom + 1 < k_top), k_bottom, NONE)
            p_bottom = tl.where((top_p < 1.0) & (p_bottom + 1 < p_top), p_bottom, NONE)
            if key_of(tl.load(best_ptr + row * parts + part)) >= tl.minimum(k_bottom, p_bottom):
                v_V = part * BLOCK + tl.arange(0, BLOCK)
                real_V = v_V < vocabulary
                x_V = tl.load(scores_ptr + row * row_stride + v_V, mask=real_V, other=float("-inf"))
                key_V = key_of(x_V)
                in_V = ((key_V >= k_bottom) & (key_V < k_top)) | ((key_V >= p_bottom) & (key_V < p_top))
                here_V = (real_V & in_V).to(tl.int32)
                count = tl.sum(here_V, axis=0)
                if count > 0:
                    size_ptr = totals_ptr + row * (2 * LEVELS + 1) + 2 * LEVELS
                    place = tl.atomic_add(size_ptr, count.to(tl.int64), sem="relaxed")
                    at_V = place + tl.cumsum(here_V, axis=0) - 1
                    tl.store(found_ptr + row * CAPACITY + at_V, x_V, mask=(here_V > 0) & (at_V < CAPACITY))

    @triton.jit
    def _reaching(from_ptr, size, low, high, middle, best, temperature, CHUNK: tl.constexpr):
        """Of the scores whose keys are in [low, high): how many are at least `middle`, their mass, the least of them,
        and the highest of the others."""
        count_C, mass_C = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int64)
        least_C, other_C = tl.zeros([CHUNK], tl.int32) + high, tl.zeros([CHUNK], tl.int32) + (low - 1)
        for begin in range(0, size, CHUNK):
            at_C = begin + tl.arange(0, CHUNK)
            x_C = tl.load(from_ptr + at_C, mask=at_C < size, other=float("-inf"))
            key_C = key_of(x_C)
            in_C = (at_C < size) & (key_C >= low) & (key_C < high)
            reach_C = in_C & (key_C >= middle)
            count_C += reach_C.to(tl.int32)
            mass_C += tl.where(reach_C & (x_C > float("-inf")), mass_of(x_C, best, temperature), 0)
            least_C = tl.minimum(least_C, tl.where(reach_C, key_C, high))
            other_C = tl.maximum(other_C, tl.where(in_C & (key_C < middle), key_C, low - 1))
        count = tl.sum(count_C, axis=0).to(tl.int64)
        return count, tl.sum(mass_C, axis=0), tl.min(least_C, axis=0), tl.max(other_C, axis=0)

    @triton.jit
    def _highest(
        from_ptr, size, low, high, count, mass, num_wanted, mass_wanted, best, temperature, CHUNK: tl.constexpr
    ):
        """The highest key in [low, high) from which on there are num_wanted scores, of mass_wanted in all; `count` of
        `mass` are above the band. Both ends move to scores that there are, so that a few scores take a few steps."""
        bottom, top = low, high
        while low + 1 < high:
            middle = ((low.to(tl.int64) + high) >> 1).to(tl.int32)
            more, heavier, least, other = _reaching(from_ptr, size, bottom, top, middle, best, temperature, CHUNK)
            reached = (count + more >= num_wanted) & ((mass + heavier).to(tl.float64) >= mass_wanted)
            low = tl.where(reached, tl.minimum(least, high - 1), low)
            high = tl.where(reached, high, tl.maximum(other, low) + 1)
        return low

    @triton.jit
    def _is_equal(row_ptr, begin, vocabulary, key, CHUNK: tl.constexpr):
        """int32: 1 where a score equals the key."""
        at_C = begin + tl.arange(0, CHUNK)
        x_C = tl.load(row_ptr + at_C, mask=at_C < vocabulary, other=float("-inf"))
        return ((at_C < vocabulary) & (key_of(x_C) == key)).to(tl.int32)

    @triton.jit
    def _nth(row_ptr, vocabulary, key, nth, CHUNK: tl.constexpr):
        """Of the scores that equal the key, nth or more, the id of the nth, counted from 1."""
        begin, before = nth * 0, nth * 0
        here = tl.sum(_is_equal(row_ptr, begin, vocabulary, key, CHUNK), axis=0)
        while (before + here < nth) & (begin < vocabulary):
            before += here
            begin += CHUNK
            here = tl.sum(_is_equal(row_ptr, begin, vocabulary, key, CHUNK), axis=0)
        equal_C = _is_equal(row_ptr, begin, vocabulary, key, CHUNK)
        is_nth_C = (equal_C > 0) & (before + tl.cumsum(equal_C, axis=0) == nth)
        return tl.min(tl.where(is_nth_C, begin + tl.arange(0, CHUNK), vocabulary - 1), axis=0)

    @triton.jit
    def _threshold_kernel(
        scores_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, best_ptr, sum_ptr, levels_ptr, totals_ptr,
        found_ptr, least_ptr, last_ptr, row_stride, vocabulary, parts,
        CAPACITY: tl.constexpr, PARTS: tl.constexpr, LEVELS: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        row_ptr = scores_ptr + row * row_stride
        top_k, top_p, temperature = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(temperature_ptr + row)
        best = row_best(best_ptr, row, parts, PARTS)
        p_P = tl.arange(0, PARTS)
        total = tl.sum(tl.load(sum_ptr + row * parts + p_P, mask=p_P < parts, other=0.0), axis=0)
        is_number = (total > 0.0) & (best < float("inf"))  # not: a NaN in the row, or nothing to draw
        key, last = tl.program_id(0) * 0 + LOWEST, row * 0 + vocabulary - 1
        if is_number & ((top_k < vocabulary) | (top_p < 1.0)):
            low, p_low, p_high = bands(levels_ptr, totals_ptr, row, top_k, top_p, best, temperature, vocabulary, LEVELS)
            high = low - 1
            size = tl.load(totals_ptr + row * (2 * LEVELS + 1) + 2 * LEVELS)
            from_ptr = found_ptr + row * CAPACITY
            if size > CAPACITY:
                from_ptr, size = row_ptr, row * 0 + vocabulary
            allowed = row * 0 + vocabulary  # scores equal to the threshold
            everything = total_of(totals_ptr, row, LEVELS - 1, LEVELS)[1]
            if top_k < vocabulary:
                bottom, top = band_keys(levels_ptr, row, low, high, best, LEVELS)
                count, mass = total_of(totals_ptr, row, high, LEVELS)
                key = _highest(from_ptr, size, bottom, top, count, mass, top_k, 0.0, best, temperature, CHUNK)
                more, heavier, _, _ = _reaching(from_ptr, size, bottom, top, key + 1, best, temperature, CHUNK)
                allowed = top_k - count - more
                everything = mass + heavier + allowed * mass_of(score_of(key), best, temperature)
            if top_p < 1.0:
                wanted, lowest = top_p.to(tl.float64) * everything.to(tl.float64), key
                low, high = p_low, p_high
                bottom, top = band_keys(levels_ptr, row, low, high, best, LEVELS)
                count, mass = total_of(totals_ptr, row, high, LEVELS)
                bottom = tl.maximum(bottom, lowest)
                key = _highest(from_ptr, size, bottom, top, count, mass, 0, wanted, best, temperature, CHUNK)
                _, heavier, _, _ = _reaching(from_ptr, size, bottom, top, key + 1, best, temperature, CHUNK)
                own = tl.maximum(mass_of(score_of(key), best, temperature), 1).to(tl.float64)
                fewest = tl.maximum(tl.ceil((wanted - (mass + heavier).to(tl.float64)) / own), 1.0).to(tl.int64)
                allowed = tl.where(key == lowest, tl.minimum(allowed, fewest), fewest)
            bottom, top = band_keys(levels_ptr, row, low, high, best, LEVELS)
            equal = total_of(totals_ptr, row, low, LEVELS)[0] - total_of(totals_ptr, row, high, LEVELS)[0]
            if bottom + 1 < top:
                equal, _, _, _ = _reaching(from_ptr, size, key, key + 1, key, best, temperature, CHUNK)
            if allowed < equal:
                last = _nth(row_ptr, vocabulary, key, allowed, CHUNK)
        least = score_of(key)
        bound = best + temperature * tl.log(tl.load(min_p_ptr + row))
        raised = is_number & (bound > least)
        tl.store(least_ptr + row, tl.where(raised, bound, least))
        tl.store(last_ptr + row, tl.where(raised, vocabulary - 1, last).to(tl.int32))


def threshold(
    scores: Tensor, temperature: Tensor, truncation: Truncation, best: Tensor, sums: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """scores [N, V]; best, sums [N, parts]: of each block of scores -> (least float32 [N], last int32 [N]).

    Kept is what is above `least`, and what equals it up to the id `last`; everything in a row that is not finite.
    """
    (rows, vocabulary), parts = scores.shape, best.shape[1]
    levels, found = scores.new_empty((rows, LEVELS)), scores.new_empty((rows, CAPACITY))
    totals = scores.new_empty((rows, 2 * LEVELS + 1), dtype=torch.int64)
    least, last = scores.new_empty(rows), scores.new_empty(rows, dtype=torch.int32)
    top_k, top_p, min_p = (x.contiguous() for x in (truncation.top_k, truncation.top_p, truncation.min_p))
    row, sizes = (scores, temperature, top_k, top_p), (scores.stride(0), vocabulary)
    shape = {"PARTS": max(2, 1 << (parts - 1).bit_length()), "LEVELS": LEVELS}
    blocks = {**shape, "BLOCK": block, "num_warps": NUM_WARPS}
    launch(levels_kernel, (rows,), *row, best, levels, totals, *sizes, parts, EVEN=EVEN, SAMPLE=SAMPLE, **shape)
    launch(totals_kernel, (rows, parts), *row, best, levels, totals, *sizes, **blocks)
    launch(_gather_kernel, (rows, parts), *row, best, levels, totals, found, *sizes, CAPACITY=CAPACITY, **blocks)
    launch(
        _threshold_kernel, (rows,), *row, min_p, best, sums, levels, totals, found, least, last, *sizes, parts,
        CAPACITY=CAPACITY, CHUNK=CHUNK, num_warps=SEARCH_WARPS, **shape,
    )  # fmt: skip
    return least, last
