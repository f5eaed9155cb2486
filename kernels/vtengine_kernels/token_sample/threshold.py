"""The least score that a truncation keeps, on a GPU, without a sort: three launches after the statistics of blocks.

LEVELS scores of each row, evenly spaced below its best, say where the threshold lies: how many scores reach each, and
with what mass. The scores between the two levels around it, few as a rule, are brought together and halved until one
is left. Masses are fixed-point integers, relative to the best score: in whatever order they are added, the sum is the
same. Suffixes: V a block of the vocabulary, P the blocks of a row, L levels, C a part of what is searched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vtengine_kernels.triton_runtime import launch, missing

if TYPE_CHECKING:
    from torch import Tensor

    from vtengine_kernels.token_sample.truncation import Truncation

LEVELS = 32  # the last is -inf: all scores
CAPACITY = 8192  # scores of a row that are brought together; of more, the row itself is searched
CHUNK = 4096
NUM_WARPS = 8
SEARCH_WARPS = 16  # of a program that works on a row alone
UNIT_BITS = 44
MAX_VOCABULARY = 1 << (62 - UNIT_BITS)
"""Of so many scores that all equal the best, the masses' sum fits int64."""

if missing() is None:
    import triton
    import triton.language as tl

    ONE: tl.constexpr = tl.constexpr(float(1 << UNIT_BITS))  # of the best score
    LOWEST: tl.constexpr = tl.constexpr(-0x7F800001)  # the key of -inf

    @triton.jit
    def _key(x):
        """int64 in the order of the scores; -0.0 is 0.0."""
        bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)

    @triton.jit
    def _score(key):
        bits = key.to(tl.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    @triton.jit
    def _mass(x, best, temperature):
        return (tl.exp((x - best) / temperature) * ONE).to(tl.int64)

    @triton.jit
    def _step(temperature):
        """Between levels: a power of two, so that every kernel rounds a level alike; at most the temperature and 1."""
        octave = tl.minimum(temperature, 1.0).to(tl.int32, bitcast=True) & 0x7F800000
        return tl.maximum(octave, 0x00800000).to(tl.float32, bitcast=True)

    @triton.jit
    def _level(n, best, step, LEVELS: tl.constexpr):
        return tl.where(n == LEVELS - 1, float("-inf"), best - n * step)

    @triton.jit
    def _row_best(best_ptr, row, parts, PARTS: tl.constexpr):
        p_P = tl.arange(0, PARTS)
        return tl.max(tl.load(best_ptr + row * parts + p_P, mask=p_P < parts, other=float("-inf")), axis=0)

    @triton.jit
    def _band(totals_ptr, row, top_k, top_p, best, temperature, vocabulary, LEVELS: tl.constexpr):
        """Where the threshold of top-k, and that of top-p, must lie: (least level, level above, scores from that one
        on, their mass). Scores from the level above on are kept by both."""
        n_L = tl.arange(0, LEVELS)
        row_ptr = totals_ptr + row * (2 * LEVELS + 1)
        count_L, mass_L = tl.load(row_ptr + n_L), tl.load(row_ptr + LEVELS + n_L)
        share_L, by_count = mass_L.to(tl.float64), top_k < vocabulary
        wanted = top_p.to(tl.float64) * tl.max(share_L, axis=0)
        low = tl.min(tl.where(tl.where(by_count, count_L >= top_k, share_L >= wanted), n_L, LEVELS - 1), axis=0)
        known = tl.max(tl.where(n_L < low, share_L, 0.0), axis=0)  # the best top_k weigh no less
        wanted = tl.where(by_count, top_p.to(tl.float64) * known, wanted)
        wanted = tl.where(top_p < 1.0, wanted, float("inf"))
        high = tl.max(tl.where((n_L < low) & (share_L < wanted), n_L, -1), axis=0)
        step = _step(temperature)
        above = tl.where(high < 0, float("inf"), _level(high, best, step, LEVELS))
        count = tl.sum(tl.where(n_L == high, count_L, 0), axis=0)
        mass = tl.sum(tl.where(n_L == high, mass_L, 0), axis=0)
        return _level(low, best, step, LEVELS), above, count, mass

    @triton.jit
    def _totals_kernel(
        scores_ptr, temperature_ptr, top_k_ptr, top_p_ptr, best_ptr, totals_ptr, row_stride, vocabulary,
        PARTS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Adds a block's scores, and their masses, to the levels that they reach."""
        row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
        if (tl.load(top_k_ptr + row) < vocabulary) | (tl.load(top_p_ptr + row) < 1.0):
            best, temperature = _row_best(best_ptr, row, parts, PARTS), tl.load(temperature_ptr + row)
            step = _step(temperature)
            v_V = part * BLOCK + tl.arange(0, BLOCK)
            real_V = v_V < vocabulary
            x_V = tl.load(scores_ptr + row * row_stride + v_V, mask=real_V, other=float("-inf"))
            mass_V = tl.where(x_V > float("-inf"), _mass(x_V, best, temperature), 0)
            level_L = _level(tl.arange(0, LEVELS), best, step, LEVELS)
            # No score of the block reaches the levels before.
            first = tl.sum((level_L > tl.load(best_ptr + row * parts + part)).to(tl.int32), axis=0)
            row_ptr = totals_ptr + row * (2 * LEVELS + 1)
            for n in range(first, LEVELS):
                reached_V = real_V & (x_V >= _level(n, best, step, LEVELS))
                tl.atomic_add(row_ptr + n, tl.sum(reached_V.to(tl.int64), axis=0), sem="relaxed")
                tl.atomic_add(row_ptr + LEVELS + n, tl.sum(tl.where(reached_V, mass_V, 0), axis=0), sem="relaxed")

    @triton.jit
    def _gather_kernel(
        scores_ptr, temperature_ptr, top_k_ptr, top_p_ptr, best_ptr, totals_ptr, found_ptr, row_stride, vocabulary,
        CAPACITY: tl.constexpr, PARTS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Brings the scores of the band together, in any order, and counts them."""
        row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
        top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
        if (top_k < vocabulary) | (top_p < 1.0):
            best, temperature = _row_best(best_ptr, row, parts, PARTS), tl.load(temperature_ptr + row)
            least, above, _, _ = _band(totals_ptr, row, top_k, top_p, best, temperature, vocabulary, LEVELS)
            if tl.load(best_ptr + row * parts + part) >= least:
                v_V = part * BLOCK + tl.arange(0, BLOCK)
                real_V = v_V < vocabulary
                x_V = tl.load(scores_ptr + row * row_stride + v_V, mask=real_V, other=float("-inf"))
                here_V = real_V & (x_V >= least) & (x_V < above)
                count = tl.sum(here_V.to(tl.int64), axis=0)
                if count > 0:
                    place = tl.atomic_add(totals_ptr + row * (2 * LEVELS + 1) + 2 * LEVELS, count, sem="relaxed")
                    at_V = place + tl.cumsum(here_V.to(tl.int64), axis=0) - 1
                    tl.store(found_ptr + row * CAPACITY + at_V, x_V, mask=here_V & (at_V < CAPACITY))

    @triton.jit
    def _reaching(from_ptr, size, low, high, middle, best, temperature, CHUNK: tl.constexpr):
        """Of the scores whose keys are in [low, high): how many are at least `middle`, their mass, the least of them,
        and the highest of the others."""
        count, mass, least, other = low * 0, low * 0, high, low - 1
        for begin in range(0, size, CHUNK):
            at_C = begin + tl.arange(0, CHUNK)
            x_C = tl.load(from_ptr + at_C, mask=at_C < size, other=float("-inf"))
            key_C = _key(x_C)
            in_C = (at_C < size) & (key_C >= low) & (key_C < high)
            reach_C = in_C & (key_C >= middle)
            mass_C = tl.where(x_C > float("-inf"), _mass(x_C, best, temperature), 0)
            count += tl.sum(reach_C.to(tl.int64), axis=0)
            mass += tl.sum(tl.where(reach_C, mass_C, 0), axis=0)
            least = tl.minimum(least, tl.min(tl.where(reach_C, key_C, high), axis=0))
            other = tl.maximum(other, tl.max(tl.where(in_C & (key_C < middle), key_C, low - 1), axis=0))
        return count, mass, least, other

    @triton.jit
    def _highest(
        from_ptr, size, low, high, count, mass, num_wanted, mass_wanted, best, temperature, CHUNK: tl.constexpr
    ):
        """The highest key in [low, high) from which on there are num_wanted scores, of mass_wanted in all; `count` of
        `mass` are above the band. Both ends move to scores that there are, so that a few scores take a few steps."""
        bottom, top = low, high
        while low + 1 < high:
            middle = low + (high - low) // 2
            more, heavier, least, other = _reaching(from_ptr, size, bottom, top, middle, best, temperature, CHUNK)
            reached = (count + more >= num_wanted) & ((mass + heavier).to(tl.float64) >= mass_wanted)
            low = tl.where(reached, tl.minimum(least, high - 1), low)
            high = tl.where(reached, high, tl.maximum(other, low) + 1)
        return low

    @triton.jit
    def _nth(row_ptr, vocabulary, key, nth, CHUNK: tl.constexpr):
        """Of the scores that equal the key, the id of the nth, counted from 1; the last id where there are fewer."""
        seen, found = nth * 0, nth * 0 + vocabulary - 1
        for begin in range(0, vocabulary, CHUNK):
            at_C = begin + tl.arange(0, CHUNK)
            x_C = tl.load(row_ptr + at_C, mask=at_C < vocabulary, other=float("-inf"))
            equal_C = (at_C < vocabulary) & (_key(x_C) == key)
            so_far_C = seen + tl.cumsum(equal_C.to(tl.int64), axis=0)
            found = tl.minimum(found, tl.min(tl.where(equal_C & (so_far_C == nth), at_C, vocabulary), axis=0))
            seen += tl.sum(equal_C.to(tl.int64), axis=0)
        return found

    @triton.jit
    def _threshold_kernel(
        scores_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, best_ptr, sum_ptr, totals_ptr, found_ptr,
        least_ptr, last_ptr, row_stride, vocabulary, parts,
        CAPACITY: tl.constexpr, PARTS: tl.constexpr, LEVELS: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        top_k, top_p, temperature = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(temperature_ptr + row)
        best = _row_best(best_ptr, row, parts, PARTS)
        p_P = tl.arange(0, PARTS)
        total = tl.sum(tl.load(sum_ptr + row * parts + p_P, mask=p_P < parts, other=0.0), axis=0)
        is_number = (total > 0.0) & (best < float("inf"))  # not: a NaN in the row, or nothing to draw
        key, last = row * 0 + LOWEST, row * 0 + vocabulary - 1
        if is_number & ((top_k < vocabulary) | (top_p < 1.0)):
            least, above, count, mass = _band(totals_ptr, row, top_k, top_p, best, temperature, vocabulary, LEVELS)
            bottom, top = _key(least), _key(above)
            size = tl.load(totals_ptr + row * (2 * LEVELS + 1) + 2 * LEVELS)
            from_ptr = found_ptr + row * CAPACITY
            if size > CAPACITY:
                from_ptr, size = scores_ptr + row * row_stride, row * 0 + vocabulary
            key, allowed = bottom, row * 0 + vocabulary  # allowed: scores equal to the threshold
            everything = tl.load(totals_ptr + row * (2 * LEVELS + 1) + 2 * LEVELS - 1)
            if top_k < vocabulary:
                key = _highest(from_ptr, size, bottom, top, count, mass, top_k, 0.0, best, temperature, CHUNK)
                more, heavier, _, _ = _reaching(from_ptr, size, bottom, top, key + 1, best, temperature, CHUNK)
                allowed = top_k - count - more
                everything = mass + heavier + allowed * _mass(_score(key), best, temperature)
            if top_p < 1.0:
                wanted = top_p.to(tl.float64) * everything.to(tl.float64)
                lowest = key
                key = _highest(from_ptr, size, lowest, top, count, mass, 0, wanted, best, temperature, CHUNK)
                _, heavier, _, _ = _reaching(from_ptr, size, bottom, top, key + 1, best, temperature, CHUNK)
                own = tl.maximum(_mass(_score(key), best, temperature), 1).to(tl.float64)
                fewest = tl.ceil((wanted - (mass + heavier).to(tl.float64)) / own).to(tl.int64)
                allowed = tl.where(key == lowest, tl.minimum(allowed, fewest), fewest)
            last = _nth(scores_ptr + row * row_stride, vocabulary, key, tl.maximum(allowed, 1), CHUNK)
        least = _score(key)
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
    totals = torch.zeros((rows, 2 * LEVELS + 1), dtype=torch.int64, device=scores.device)
    found = scores.new_empty((rows, CAPACITY))
    least, last = scores.new_empty(rows), scores.new_empty(rows, dtype=torch.int32)
    top_k, top_p, min_p = (x.contiguous() for x in (truncation.top_k, truncation.top_p, truncation.min_p))
    row, sizes = (scores, temperature, top_k, top_p), (scores.stride(0), vocabulary)
    shape = {"PARTS": max(2, 1 << (parts - 1).bit_length()), "LEVELS": LEVELS}
    blocks = {**shape, "BLOCK": block, "num_warps": NUM_WARPS}
    launch(_totals_kernel, (rows, parts), *row, best, totals, *sizes, **blocks)
    launch(_gather_kernel, (rows, parts), *row, best, totals, found, *sizes, CAPACITY=CAPACITY, **blocks)
    launch(
        _threshold_kernel, (rows,), *row, min_p, best, sums, totals, found, least, last, *sizes, parts,
        CAPACITY=CAPACITY, CHUNK=CHUNK, num_warps=SEARCH_WARPS, **shape,
    )  # fmt: skip
    return least, last
