"""Triton kernels of patchify: one pass over interleaved pixels, or over planes of levels, with values as patches.

`first` int32 [size_out] is where the window of an output begins; no tap lies past the input. Weights are int32,
[taps, size_out] where a pass goes across, [size_out, taps] where it goes down, so that those of one output of a row are
neighbours. A window of more than TAPS taps is summed in several rounds of TAPS. A program makes LINES lines of its
columns, all of whose loads are under way together; offsets within them are 32 bits. Lines past the last are others made
once more. `half` is one half in the weights' scale, no constant, since sums begin
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
def _sums_of_bytes(window_LC, weights, red, green, blue, TAPS: tl.constexpr):
    """Adds TAPS pixels, read byte by byte."""
    for tap in tl.static_range(TAPS):
        red += tl.load(window_LC + 3 * tap).to(tl.int32) * weights[tap]
        green += tl.load(window_LC + (3 * tap + 1)).to(tl.int32) * weights[tap]
        blue += tl.load(window_LC + (3 * tap + 2)).to(tl.int32) * weights[tap]
    return red, green, blue


@triton.jit
def _sums_of_words(word_LC, before_1C, weights, red, green, blue, TAPS: tl.constexpr):
    """Adds TAPS pixels, read in aligned words of four bytes. before_1C: bytes of the first word before the window."""
    WORDS: tl.constexpr = (3 * TAPS + 6) // 4  # that a window could lie in
    shift_1C = (8 * before_1C).to(tl.uint64)
    last_1C = before_1C + 3 * TAPS > WORDS * 4 - 4  # a part of it lies in the last word
    low_LC = tl.load(word_LC)
    for place in tl.static_range(3 * TAPS):
        if place % 4 == 0:
            if place // 4 + 2 < WORDS:
                high_LC = tl.load(word_LC + (place // 4 + 1))
            elif place // 4 + 1 < WORDS:
                high_LC = tl.load(word_LC + (place // 4 + 1), mask=last_1C)
            both_LC = (high_LC.to(tl.uint64) << 32) | low_LC
            bytes_LC = (both_LC >> shift_1C).to(tl.uint32)
            low_LC = high_LC
        term_LC = ((bytes_LC >> (place % 4 * 8)) & 255).to(tl.int32) * weights[place // 3]
        if place % 3 == 0:
            red += term_LC
        elif place % 3 == 1:
            green += term_LC
        else:
            blue += term_LC
    return red, green, blue


# One pass across, of interleaved pixels, at least LINES high. To "pixels": interleaved again; to "units"; to "patches":
# values. WORDS: rows begin multiples of four bytes after one another.
@triton.jit(do_not_specialize=["height", "width", "rounds", "half", "source_row", "out_row"])
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
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_blocks = tl.cdiv(width, COLUMNS)
    top = tl.minimum(tl.program_id(0) // column_blocks * LINES, height - LINES)
    line_L = tl.arange(0, LINES)
    column_C = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    in_1C = (column_C < width)[None, :]
    near_1C = tl.minimum(column_C, width - 1)[None, :]
    first_1C = 3 * tl.load(first_ptr + near_1C)
    weight_1C = weight_ptr + near_1C
    red = tl.zeros([LINES, COLUMNS], tl.int32) + half
    green, blue = red, red
    if WORDS:
        address_1C = source_ptr.to(tl.int64) + first_1C
        word_LC = (address_1C & -4).to(tl.pointer_type(tl.uint32)) + top.to(tl.int64) * (source_row // 4)
        word_LC += (line_L * (source_row // 4))[:, None]
        before_1C, weights = (address_1C & 3).to(tl.int32), _several(weight_1C, width, TAPS)
        red, green, blue = _sums_of_words(word_LC, before_1C, weights, red, green, blue, TAPS)
    else:
        window_LC = source_ptr + top.to(tl.int64) * source_row + first_1C + (line_L * source_row)[:, None]
        if ONE_ROUND:
            red, green, blue = _sums_of_bytes(window_LC, _several(weight_1C, width, TAPS), red, green, blue, TAPS)
        else:
            for _ in range(rounds):
                weights = _several(weight_1C, width, TAPS)
                red, green, blue = _sums_of_bytes(window_LC, weights, red, green, blue, TAPS)
                window_LC += 3 * TAPS
                weight_1C += TAPS * width
    sums = (red, green, blue)
    if TO == "patches":
        SIZE: tl.constexpr = PATCH * PATCH
        patch_C = (column_C // (2 * PATCH)).to(tl.int64) * 4 + column_C // PATCH % 2
        to_C = patch_C * (3 * SIZE * FRAMES) + column_C % PATCH
        row_L = top + line_L
        line_L = row_L // PATCH
        patch_L = (line_L // 2).to(tl.int64) * (width // PATCH * 2) + line_L % 2 * 2
        out_LC = out_ptr + (patch_L * (3 * SIZE * FRAMES) + row_L % PATCH * PATCH)[:, None]
        out_LC += tl.max_contiguous(to_C, 1)[None, :]  # a column a thread
        for channel in tl.static_range(3):
            if COMPUTED:
                slope, offset = tl.load(table_ptr + 2 * channel), tl.load(table_ptr + (2 * channel + 1))
                value_LC = _line(sums[channel] >> BITS, slope, offset)
            else:
                value_LC = tl.load(table_ptr + 256 * channel + _level(sums[channel], BITS))
            for frame in tl.static_range(FRAMES):
                tl.store(out_LC + (FRAMES * channel + frame) * SIZE, value_LC, mask=in_1C)
    else:
        if TO == "units":
            to_C = column_C // (GROUP * PATCH) * (3 * GROUP * UNIT)
            to_C += column_C // PATCH % GROUP * UNIT + column_C % PATCH
        else:
            to_C = 3 * column_C
        out_LC = out_ptr + top.to(tl.int64) * out_row + tl.max_contiguous(to_C, 1)[None, :]
        out_LC += (line_L * out_row)[:, None]
        for channel in tl.static_range(3):
            level_LC = _level(sums[channel], BITS).to(tl.uint8)
            tl.store(out_LC + channel * (GROUP * UNIT if TO == "units" else 1), level_LC, mask=in_1C)


@triton.jit
def _sum_down(byte_LC, source_row, weight_L, in_1C, total_LC, TAPS: tl.constexpr):
    """Adds TAPS rows from the pointers byte_LC on. weight_L: pointers to each line's first weight."""
    for tap in tl.static_range(TAPS):
        weight = tl.load(weight_L + tap)[:, None]
        total_LC += tl.load(byte_LC, mask=in_1C, other=0).to(tl.int32) * weight
        byte_LC += source_row
    return total_LC


# One pass down, of bytes whatever they are.
@triton.jit(do_not_specialize=["height", "rounds", "half"])
def _down_kernel(
    source_ptr,
    out_ptr,
    first_ptr,
    weight_ptr,
    height,
    columns,
    rounds,
    half,
    source_row,
    out_row,
    TAPS: tl.constexpr,
    ONE_ROUND: tl.constexpr,
    BITS: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_blocks = tl.cdiv(columns, COLUMNS)
    row_L = tl.minimum(tl.program_id(0) // column_blocks * LINES + tl.arange(0, LINES), height - 1)
    column_C = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    in_1C = (column_C < columns)[None, :]
    byte_LC = source_ptr + (tl.load(first_ptr + row_L).to(tl.int64) * source_row)[:, None] + column_C[None, :]
    weight_L = weight_ptr + row_L.to(tl.int64) * (rounds * TAPS)
    total_LC = tl.zeros([LINES, COLUMNS], tl.int32) + half
    if ONE_ROUND:
        total_LC = _sum_down(byte_LC, source_row, weight_L, in_1C, total_LC, TAPS)
    else:
        for _ in range(rounds):
            total_LC = _sum_down(byte_LC, source_row, weight_L, in_1C, total_LC, TAPS)
            byte_LC += TAPS * source_row
            weight_L += TAPS
    out_LC = out_ptr + (row_L.to(tl.int64) * out_row)[:, None] + column_C[None, :]
    tl.store(out_LC, _level(total_LC, BITS).to(tl.uint8), mask=in_1C)


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


# The last pass down, from units to patches. A program makes UNITS units of LINES lines of one line of patches.
@triton.jit(do_not_specialize=["patches", "rounds", "half"])
def _down_patches_kernel(
    source_ptr,
    out_ptr,
    first_ptr,
    weight_ptr,
    table_ptr,
    patches,
    rounds,
    half,
    TAPS: tl.constexpr,
    ONE_ROUND: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTED: tl.constexpr,
    FRAMES: tl.constexpr,
    PATCH: tl.constexpr,
    LINES: tl.constexpr,
    UNITS: tl.constexpr,
):
    SIZE: tl.constexpr = PATCH * PATCH * FRAMES
    units = tl.cdiv(patches, GROUP) * (3 * GROUP)
    unit_blocks = tl.cdiv(units, UNITS)
    part = tl.program_id(0) // unit_blocks  # in order: all parts of a line of patches, then those of the next
    line = part // tl.cdiv(PATCH, LINES)
    place_L = part % tl.cdiv(PATCH, LINES) * LINES + tl.arange(0, LINES)  # in the patch
    row_L = line * PATCH + tl.minimum(place_L, PATCH - 1)
    first_unit = (tl.program_id(0) % unit_blocks) * UNITS
    first_patch = first_unit // (3 * GROUP) * GROUP
    out_ptr += ((line // 2).to(tl.int64) * (2 * patches) + line % 2 * 2 + first_patch.to(tl.int64) * 2) * (3 * SIZE)
    unit_U, pixel_X = first_unit + tl.arange(0, UNITS), tl.arange(0, UNIT)
    channel_U = unit_U // GROUP % 3
    patch_U = unit_U // (3 * GROUP) * GROUP + unit_U % GROUP - first_patch
    to_U = (patch_U // 2 * 12 + patch_U % 2 * 3 + channel_U) * SIZE  # a window has 2 x 2 patches of 3 units
    to_ULX = to_U[:, None, None] + (place_L * PATCH)[None, :, None] + pixel_X[None, None, :]
    in_ULX = (patch_U < patches - first_patch)[:, None, None] & (pixel_X < PATCH)[None, None, :]
    if PATCH % LINES != 0:
        in_ULX = in_ULX & (place_L < PATCH)[None, :, None]
    WORDS: tl.constexpr = UNITS * UNIT // 4
    row_words = units * (UNIT // 4)
    word_W = source_ptr.to(tl.pointer_type(tl.uint32)) + first_unit * (UNIT // 4) + tl.arange(0, WORDS)
    word_LW = (tl.load(first_ptr + row_L).to(tl.int64) * row_words)[:, None] + word_W[None, :]
    weight_L = weight_ptr + row_L.to(tl.int64) * (rounds * TAPS)
    sum3 = tl.zeros([LINES, WORDS], tl.int32) + half
    sum0 = sum3 + 256 * half  # so that each difference below begins at one half, modulo 2^32
    sum1, sum2 = sum0, sum0
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
        slope_1U1 = tl.load(table_ptr + channel_U * 2)[None, :, None]
        offset_1U1 = tl.load(table_ptr + (channel_U * 2 + 1))[None, :, None]
        value_LUX = _line(level_LUX, slope_1U1, offset_1U1)
    else:
        table_1U1 = (table_ptr + channel_U * 256)[None, :, None]
        value_LUX = tl.load(table_1U1 + tl.minimum(tl.maximum(level_LUX, 0), 255))
    value_ULX = tl.permute(value_LUX, (1, 0, 2))
    for frame in tl.static_range(FRAMES):
        tl.store(out_ptr + frame * (PATCH * PATCH) + to_ULX, value_ULX, mask=in_ULX)
