"""Where in a row of scores the threshold of a truncation lies, on a GPU: two launches.

LEVELS scores of each row are its levels: a few evenly spaced below the best, the others quantiles of a sample, so that
between two there are few scores, or many equal ones, however the scores lie. Of each level it is known how many scores
reach it, and with what mass. Masses are fixed-point integers, relative to the best score: in whatever order they are
added, the sum is the same. Suffixes: V a block of the vocabulary, P the blocks of a row, S the sample, T the totals, L
levels.
"""

from __future__ import annotations

from vtengine_kernels.triton_runtime import missing

LEVELS = 32  # the last is -inf: all scores
EVEN = 8  # of them are a temperature apart
SAMPLE = 512
UNIT_BITS = 44
MAX_VOCABULARY = 1 << (62 - UNIT_BITS)
"""Of so many scores that all equal the best, the masses' sum fits int64."""

if missing() is None:
    import triton
    import triton.language as tl

    ONE: tl.constexpr = tl.constexpr(float(1 << UNIT_BITS))  # of the best score
    GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B1)  # of 2 ** 32: its multiples are evenly spread, without a period

    @triton.jit
    def key_of(x):
        """int32 in the order of the scores; -0.0 is 0.0."""
        bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @triton.jit
    def score_of(key):
        return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    @triton.jit
    def mass_of(x, best, temperature):
        return (tl.exp((x - best) / temperature) * ONE).to(tl.int64)

    @triton.jit
    def row_best(best_ptr, row, parts, PARTS: tl.constexpr):
        p_P = tl.arange(0, PARTS)
        return tl.max(tl.load(best_ptr + row * parts + p_P, mask=p_P < parts, other=float("-inf")), axis=0)

    @triton.jit
    def levels_kernel(
        scores_ptr, temperature_ptr, top_k_ptr, top_p_ptr, best_ptr, levels_ptr, totals_ptr, row_stride, vocabulary,
        parts, PARTS: tl.constexpr, LEVELS: tl.constexpr, EVEN: tl.constexpr, SAMPLE: tl.constexpr,
    ):  # fmt: skip
        """A row's levels, the highest first; no totals yet."""
        row = tl.program_id(0).to(tl.int64)
        if (tl.load(top_k_ptr + row) < vocabulary) | (tl.load(top_p_ptr + row) < 1.0):
            spread_S = (tl.arange(0, SAMPLE).to(tl.int64) * GOLDEN) & 0xFFFFFFFF
            x_S = tl.load(scores_ptr + row * row_stride + ((spread_S * vocabulary) >> 32))
            n_L = tl.arange(0, LEVELS)
            rank_L = (n_L - EVEN + 1) * SAMPLE // (LEVELS - 1 - EVEN) - 1
            rank_L = tl.minimum(tl.maximum(rank_L, 0), SAMPLE - 1)
            x_L = tl.gather(tl.sort(x_S, descending=True), rank_L, 0)
            # A score that is so frequent gets a band of its own: up to the next float above it.
            same_LL = (x_L[:, None] == x_L[None, :]) & (n_L[:, None] < n_L[None, :]) & (n_L[None, :] < LEVELS - 1)
            is_again_L = tl.max((same_LL & (n_L[:, None] >= EVEN)).to(tl.int32), axis=1) > 0
            x_L = tl.where(is_again_L, score_of(key_of(x_L) + 1), x_L)
            even_L = row_best(best_ptr, row, parts, PARTS) - n_L * tl.load(temperature_ptr + row)
            level_L = tl.where(n_L < EVEN, even_L, tl.where(n_L == LEVELS - 1, float("-inf"), x_L))
            tl.store(levels_ptr + row * LEVELS + n_L, tl.sort(level_L, descending=True))
            n_T = tl.arange(0, 4 * LEVELS)
            tl.store(totals_ptr + row * (2 * LEVELS + 1) + n_T, n_T.to(tl.int64) * 0, mask=n_T < 2 * LEVELS + 1)

    @triton.jit
    def level(levels_ptr, row, n, best, LEVELS: tl.constexpr):
        """The nth; before the first, the next float above the best."""
        return tl.where(n < 0, score_of(key_of(best) + 1), tl.load(levels_ptr + row * LEVELS + tl.maximum(n, 0)))

    @triton.jit
    def band_keys(levels_ptr, row, low, high, best, LEVELS: tl.constexpr):
        """A band's keys: from the one of the level `low` up to that of `high`, which is not in it."""
        return key_of(level(levels_ptr, row, low, best, LEVELS)), key_of(level(levels_ptr, row, high, best, LEVELS))

    @triton.jit
    def total_of(totals_ptr, row, n, LEVELS: tl.constexpr):
        """(scores that reach the nth level, their mass)."""
        row_ptr = totals_ptr + row * (2 * LEVELS + 1)
        count = tl.load(row_ptr + n, mask=n >= 0, other=0)
        return count, tl.load(row_ptr + LEVELS + n, mask=n >= 0, other=0)

    @triton.jit
    def bands(levels_ptr, totals_ptr, row, top_k, top_p, best, temperature, vocabulary, LEVELS: tl.constexpr):
        """Numbers of levels: the threshold of top-k lies between the first and the one before it, that of top-p
        between the second and the third, with scores from the third on all kept."""
        n_L = tl.arange(0, LEVELS)
        row_ptr = totals_ptr + row * (2 * LEVELS + 1)
        count_L, mass_L = tl.load(row_ptr + n_L), tl.load(row_ptr + LEVELS + n_L)
        of_k = tl.min(tl.where(count_L >= top_k, n_L, LEVELS - 1), axis=0)
        fewest = tl.max(mass_L, axis=0)
        most = fewest
        if top_k < vocabulary:  # what the best top_k weigh: the last of them no less, no more than the band's ends
            count, mass = total_of(totals_ptr, row, of_k - 1, LEVELS)
            _, enough = total_of(totals_ptr, row, of_k, LEVELS)
            lightest = (top_k - count) * mass_of(level(levels_ptr, row, of_k, best, LEVELS), best, temperature)
            highest = score_of(key_of(level(levels_ptr, row, of_k - 1, best, LEVELS)) - 1)
            heaviest = (top_k - count) * mass_of(tl.minimum(highest, best), best, temperature)
            # exp rounds: a score may weigh a little more than the next one.
            fewest = mass + lightest - (lightest >> 16)
            most = tl.minimum(mass + heaviest + (heaviest >> 16), enough)
        share_L, share = mass_L.to(tl.float64), top_p.to(tl.float64)
        low = tl.min(tl.where(share_L >= share * most.to(tl.float64), n_L, LEVELS - 1), axis=0)
        high = tl.max(tl.where(share_L < share * fewest.to(tl.float64), n_L, -1), axis=0)
        return of_k, low, tl.minimum(high, low - 1)

    @triton.jit
    def totals_kernel(
        scores_ptr, temperature_ptr, top_k_ptr, top_p_ptr, best_ptr, levels_ptr, totals_ptr, row_stride, vocabulary,
        PARTS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Adds a block's scores, and their masses, to the levels that they reach."""
        row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
        if (tl.load(top_k_ptr + row) < vocabulary) | (tl.load(top_p_ptr + row) < 1.0):
            best, temperature = row_best(best_ptr, row, parts, PARTS), tl.load(temperature_ptr + row)
            v_V = part * BLOCK + tl.arange(0, BLOCK)
            real_V = v_V < vocabulary
            x_V = tl.load(scores_ptr + row * row_stride + v_V, mask=real_V, other=float("-inf"))
            mass_V = tl.where(x_V > float("-inf"), mass_of(x_V, best, temperature), 0)
            level_L = tl.load(levels_ptr + row * LEVELS + tl.arange(0, LEVELS))
            # No score of the block reaches the levels before.
            first = tl.sum((level_L > tl.load(best_ptr + row * parts + part)).to(tl.int32), axis=0)
            row_ptr = totals_ptr + row * (2 * LEVELS + 1)
            for n in range(first, LEVELS):
                reached_V = real_V & (x_V >= tl.load(levels_ptr + row * LEVELS + n))
                tl.atomic_add(row_ptr + n, tl.sum(reached_V.to(tl.int32), axis=0).to(tl.int64), sem="relaxed")
                tl.atomic_add(row_ptr + LEVELS + n, tl.sum(tl.where(reached_V, mass_V, 0), axis=0), sem="relaxed")
