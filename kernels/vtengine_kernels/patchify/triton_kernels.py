"""Triton kernels of patchify: one pass over interleaved pixels, or over planes of levels, with values as patches.

`first` int32 [size_out] is where the window of an output begins; no tap lies past the input. Weights are int32,
[taps, size_out] where a pass goes across, [size_out, taps] where it goes down, so that those of one output of a row are
neighbours. A window of more than TAPS taps is summed in several rounds of TAPS. A program goes through `rows` rows of
its columns; offsets within a row are 32 bits. `half` is one half in the weights' scale, no constant, since sums begin
with it: the compiler would add a constant at the end.

Between the last two passes, levels lie in units, uint8 [height, groups, 3, GROUP, UNIT]: a unit holds the part of a row
that belongs to one channel of one patch and is read as aligned words, a group is that of GROUP neighbouring patches, so
that what a warp writes fills sectors of 32 bytes.

Suffixes: C columns, L lines, W words, U units, X pixels of a unit.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT, GROUP = tl.constexpr(16), tl.constexpr(8)


@triton.jit
def _level(total, BITS: tl.constexpr):
    """int32 0..255 of a weighted sum that began at one half."""
    return tl.minimum(tl.maximum(total >> BITS, 0), 255)


@triton.jit
def _line(level, slope, offset):
    """The bits of bfloat16 slope * x + offset, where x is level / 255 within 0 and 1; not interpreted."""
    x = tl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, 0f3B808081, 0f00000000;", "=r,r", [level.to(tl.float32)], tl.float32, True, 1
    )
    slope, x = tl.broadcast(slope, x)
    offset, x = tl.broadcast(offset, x)
    return tl.fma(x, slope, offset).to(tl.bfloat16).to(tl.int16, bitcast=True)


@triton.jit
def _several(first_ptr, stride, COUNT: tl.constexpr):
    """A tuple of what lies at first_ptr and `stride` elements further on."""
    found = ()
    for each in tl.static_range(COUNT):
        found += (tl.load(first_ptr + each * stride),)  # type: ignore[assignment]
    return found


@triton.jit
def _sums_of_bytes(window_ptr, weights, red, green, blue, TAPS: tl.constexpr):
    """Adds TAPS pixels, read byte by byte."""
    for tap in tl.static_range(TAPS):
        red += tl.load(window_ptr + 3 * tap).to(tl.int32) * weights[tap]
        green += tl.load(window_ptr + (3 * tap + 1)).to(tl.int32) * weights[tap]
        blue += tl.load(window_ptr + (3 * tap + 2)).to(tl.int32) * weights[tap]
    return red, green, blue


@triton.jit
def _sums_of_words(word_ptr, shift_C, last_C, weights, red, green, blue, TAPS: tl.constexpr):
    """Adds TAPS pixels, read in aligned words of four bytes. shift_C: bits of the first word before the window;
    last_C: where the last word that a window could lie in holds a part of it."""
    WORDS: tl.constexpr = (3 * TAPS + 6) // 4
    low_C = tl.load(word_ptr)
    for place in tl.static_range(3 * TAPS):
        if place % 4 == 0:
            if place // 4 + 2 < WORDS:
                high_C = tl.load(word_ptr + (place // 4 + 1))
            elif place // 4 + 1 < WORDS:
                high_C = tl.load(word_ptr + (place // 4 + 1), mask=last_C)
            both_C = (high_C.to(tl.uint64) << 32) | low_C
            bytes_C = (both_C >> shift_C).to(tl.uint32)
            low_C = high_C
        term_C = ((bytes_C >> (place % 4 * 8)) & 255).to(tl.int32) * weights[place // 3]
        if place % 3 == 0:
            red += term_C
        elif place % 3 == 1:
            green += term_C
        else:
            blue += term_C
    return red, green, blue


# One pass across, of interleaved pixels. To "pixels": interleaved again; to "units"; to "patches": values.
@triton.jit(do_not_specialize=["height", "width", "rounds", "half", "column_blocks", "rows", "source_row", "out_row"])
def _across_kernel(
    source_ptr,
    out_ptr,
    first_ptr,
    weight_ptr,
    table_ptr,
    height,
    width,
    rounds,
    half,
    column_blocks,
    rows,
    source_row,
    out_row,
    TO: tl.constexpr,
    TAPS: tl.constexpr,
    ONE_ROUND: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTED: tl.constexpr,
    FRAMES: tl.constexpr,
    PATCH: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    top = tl.program_id(0) // column_blocks * rows
    column_C = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    in_C = column_C < width
    near_C = tl.minimum(column_C, width - 1)
    first_C = 3 * tl.load(first_ptr + near_C)
    weight_C = weight_ptr + near_C
    if ONE_ROUND:
        weights = _several(weight_C, width, TAPS)
    if TO == "patches":
        SIZE: tl.constexpr = PATCH * PATCH
        patch_C = (column_C // (2 * PATCH)).to(tl.int64) * 4 + column_C // PATCH % 2
        to_C = patch_C * (3 * SIZE * FRAMES) + column_C % PATCH
        if COMPUTED:
            lines = _several(table_ptr, 1, 6)  # slope and offset of each channel
    elif TO == "units":
        to_C = column_C // (GROUP * PATCH) * (3 * GROUP * UNIT) + column_C // PATCH % GROUP * UNIT + column_C % PATCH
    else:
        to_C = 3 * column_C
    window_C = source_ptr + top.to(tl.int64) * source_row + first_C
    half_C = tl.zeros_like(column_C) + half
    if WORDS:
        before_C = (window_C.to(tl.int64) & 3).to(tl.int32)
        word_C = (window_C.to(tl.int64) & -4).to(tl.pointer_type(tl.uint32))
        shift_C = (8 * before_C).to(tl.uint64)
        last_C = before_C + 3 * TAPS > (3 * TAPS + 6) // 4 * 4 - 4
    for row in range(top, tl.minimum(top + rows, height)):
        red, green, blue = half_C, half_C, half_C
        if WORDS:
            red, green, blue = _sums_of_words(word_C, shift_C, last_C, weights, red, green, blue, TAPS)
            word_C += source_row // 4
        elif ONE_ROUND:
            red, green, blue = _sums_of_bytes(window_C, weights, red, green, blue, TAPS)
            window_C += source_row
        else:
            for part in range(rounds):
                some = _several(weight_C + part * TAPS * width, width, TAPS)
                red, green, blue = _sums_of_bytes(window_C + part * 3 * TAPS, some, red, green, blue, TAPS)
            window_C += source_row
        sums = (red, green, blue)
        if TO == "patches":
            line = row // PATCH
            patch = tl.cast(line // 2, tl.int64) * (width // PATCH * 2) + line % 2 * 2
            row_C = out_ptr + patch * (3 * SIZE * FRAMES) + row % PATCH * PATCH + to_C
            for channel in tl.static_range(3):
                if COMPUTED:
                    value_C = _line(sums[channel] >> BITS, lines[2 * channel], lines[2 * channel + 1])
                else:
                    value_C = tl.load(table_ptr + 256 * channel + _level(sums[channel], BITS))
                for frame in tl.static_range(FRAMES):
                    tl.store(row_C + (FRAMES * channel + frame) * SIZE, value_C, mask=in_C)
        else:
            row_C = out_ptr + tl.cast(row, tl.int64) * out_row + tl.max_contiguous(to_C, 1)  # a column a thread
            for channel in tl.static_range(3):
                tl.store(
                    row_C + channel * (GROUP * UNIT if TO == "units" else 1),
                    _level(sums[channel], BITS).to(tl.uint8),
                    mask=in_C,
                )


@triton.jit
def _sum_down(column_ptr, weight_ptr, source_row, mask_C, total_C, TAPS: tl.constexpr):
    """Adds TAPS rows from column_ptr, [C], on. weight_ptr: of the first of them."""
    for tap in tl.static_range(TAPS):
        weight = tl.load(weight_ptr + tap)
        total_C += tl.load(column_ptr, mask=mask_C, other=0).to(tl.int32) * weight
        column_ptr += source_row
    return total_C


# One pass down, of bytes whatever they are.
@triton.jit(do_not_specialize=["height", "rounds", "half", "column_blocks", "rows"])
def _down_kernel(
    source_ptr,
    out_ptr,
    first_ptr,
    weight_ptr,
    height,
    columns,
    rounds,
    half,
    column_blocks,
    rows,
    source_row,
    out_row,
    TAPS: tl.constexpr,
    ONE_ROUND: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    top = tl.program_id(0) // column_blocks * rows
    column_C = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    in_C = column_C < columns
    half_C = tl.zeros_like(column_C) + half
    for row in range(top, tl.minimum(top + rows, height)):
        weight_row = weight_ptr + tl.cast(row, tl.int64) * (rounds * TAPS)
        column_ptr = source_ptr + tl.load(first_ptr + row).to(tl.int64) * source_row + column_C
        total_C = half_C
        if ONE_ROUND:
            total_C = _sum_down(column_ptr, weight_row, source_row, in_C, total_C, TAPS)
        else:
            for _ in range(rounds):
                total_C = _sum_down(column_ptr, weight_row, source_row, in_C, total_C, TAPS)
                column_ptr += TAPS * source_row
                weight_row += TAPS
        row_ptr = out_ptr + tl.cast(row, tl.int64) * out_row
        tl.store(row_ptr + column_C, _level(total_C, BITS).to(tl.uint8), mask=in_C)


@triton.jit
def _sums_down(word_LW, row_words, weight_L, sum0, sum1, sum2, sum3, TAPS: tl.constexpr):
    """Adds TAPS rows of words from the pointers word_LW on: the words, and those without their lowest one to three
    bytes. weight_L: pointers to each line's first weight."""
    for tap in tl.static_range(TAPS):
        weight = tl.load(weight_L + tap)[:, None]
        word = tl.load(word_LW)
        sum0 += word.to(tl.int32, bitcast=True) * weight
        sum1 += (word >> 8).to(tl.int32) * weight
        sum2 += (word >> 16).to(tl.int32) * weight
        sum3 += (word >> 24).to(tl.int32) * weight
        word_LW += row_words
    return sum0, sum1, sum2, sum3


# The last pass down, from units to patches. A program makes UNITS units of its rows, LINES rows at once.
@triton.jit(do_not_specialize=["patches", "rounds", "half", "unit_blocks", "rows"])
def _down_patches_kernel(
    source_ptr,
    out_ptr,
    first_ptr,
    weight_ptr,
    table_ptr,
    patches,
    rounds,
    half,
    unit_blocks,
    rows,
    TAPS: tl.constexpr,
    ONE_ROUND: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTED: tl.constexpr,
    FRAMES: tl.constexpr,
    PATCH: tl.constexpr,
    LINES: tl.constexpr,
    UNITS: tl.constexpr,
):
    top = tl.program_id(0) // unit_blocks * rows
    first_unit = (tl.program_id(0) % unit_blocks) * UNITS
    SIZE: tl.constexpr = PATCH * PATCH * FRAMES
    line = top // PATCH
    first_patch = first_unit // (3 * GROUP) * GROUP
    out_ptr += ((line // 2).to(tl.int64) * (2 * patches) + line % 2 * 2 + first_patch.to(tl.int64) * 2) * (3 * SIZE)
    out_ptr += top % PATCH * PATCH
    unit_U = first_unit + tl.arange(0, UNITS)
    channel_U = unit_U // GROUP % 3
    patch_U = unit_U // (3 * GROUP) * GROUP + unit_U % GROUP - first_patch
    to_U = (patch_U // 2 * 12 + patch_U % 2 * 3 + channel_U) * SIZE  # a window has 2 x 2 patches of 3 units
    line_L, pixel_X = tl.arange(0, LINES), tl.arange(0, UNIT)
    to_ULX = to_U[:, None, None] + (line_L * PATCH)[None, :, None] + pixel_X[None, None, :]
    in_ULX = (patch_U < patches - first_patch)[:, None, None] & (pixel_X < PATCH)[None, None, :]
    if COMPUTED:
        slope_1U1 = tl.load(table_ptr + channel_U * 2)[None, :, None]
        offset_1U1 = tl.load(table_ptr + (channel_U * 2 + 1))[None, :, None]
    else:
        table_1U1 = (table_ptr + channel_U * 256)[None, :, None]
    WORDS: tl.constexpr = UNITS * UNIT // 4
    row_words = tl.cdiv(patches, GROUP) * (3 * GROUP * UNIT // 4)
    word_W = source_ptr.to(tl.pointer_type(tl.uint32)) + first_unit * (UNIT // 4) + tl.arange(0, WORDS)
    half_LW = tl.zeros([LINES, WORDS], tl.int32) + half
    start_LW = half_LW + 256 * half  # so that each difference below begins at one half, modulo 2^32
    for row in range(top, top + rows, LINES):
        first_L = tl.load(first_ptr + row + line_L).to(tl.int64)
        weight_L = weight_ptr + (tl.cast(row, tl.int64) + line_L) * (rounds * TAPS)
        word_LW = (first_L * row_words)[:, None] + word_W[None, :]
        sum0, sum1, sum2, sum3 = start_LW, start_LW, start_LW, half_LW
        if ONE_ROUND:
            sum0, sum1, sum2, sum3 = _sums_down(word_LW, row_words, weight_L, sum0, sum1, sum2, sum3, TAPS)
        else:
            for _ in range(rounds):
                sum0, sum1, sum2, sum3 = _sums_down(word_LW, row_words, weight_L, sum0, sum1, sum2, sum3, TAPS)
                word_LW += TAPS * row_words
                weight_L += TAPS
        even, odd = tl.join(sum0 - sum1 * 256, sum2 - sum3 * 256), tl.join(sum1 - sum2 * 256, sum3)
        level_LUX = tl.reshape(tl.join(even, odd), (LINES, UNITS, UNIT)) >> BITS
        if COMPUTED:
            value_LUX = _line(level_LUX, slope_1U1, offset_1U1)
        else:
            value_LUX = tl.load(table_1U1 + tl.minimum(tl.maximum(level_LUX, 0), 255))
        value_ULX = tl.permute(value_LUX, (1, 0, 2))
        for frame in tl.static_range(FRAMES):
            tl.store(out_ptr + frame * (PATCH * PATCH) + to_ULX, value_ULX, mask=in_ULX)
        out_ptr += LINES * PATCH
