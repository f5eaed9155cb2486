"""Triton kernels of patchify: one pass over an image of interleaved pixels or over planes, and values as patches.

Weights of a pass are int32 [taps, size_out], `first` [size_out] is where the window of an output begins; no tap lies
past the input. A window of more than TAPS taps is summed in several rounds of TAPS. Offsets within a program are 32
bits, from 64-bit addresses that a program computes once.

Suffixes: R rows, C columns of the output, P patches.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROOM = tl.constexpr(16)  # bytes of a plane that hold one row of a patch: such planes are read in aligned vectors


@triton.jit
def _level(total, BITS: tl.constexpr):
    """int32 0..255 of a weighted sum that began at one half."""
    return tl.minimum(tl.maximum(total >> BITS, 0), 255)


@triton.jit
def _value(level, table_ptr, channel, COMPUTED: tl.constexpr):
    """As stored. COMPUTED: the table holds slope and offset of each channel, not the bits of its 256 values."""
    if COMPUTED:
        slope, offset = tl.load(table_ptr + 2 * channel), tl.load(table_ptr + 2 * channel + 1)
        return tl.fma(level.to(tl.float32), slope, offset).to(tl.bfloat16).to(tl.int16, bitcast=True)
    return tl.load(table_ptr + 256 * channel + level)


@triton.jit
def _byte_sums(line_ptr, from_RC, weight_ptr, weight_stride, rounds, TAPS: tl.constexpr, BITS: tl.constexpr):
    """Three int32 [R, C], the sums of one channel each, read byte by byte. from_RC: bytes from line_ptr to a window."""
    red = tl.zeros_like(from_RC) + (1 << (BITS - 1))
    green = red
    blue = red
    for _ in range(rounds):
        at_RC = line_ptr + from_RC
        for tap in tl.static_range(TAPS):
            weight_C = tl.load(weight_ptr + tap * weight_stride)[None, :]
            red += tl.load(at_RC + 3 * tap).to(tl.int32) * weight_C
            green += tl.load(at_RC + (3 * tap + 1)).to(tl.int32) * weight_C
            blue += tl.load(at_RC + (3 * tap + 2)).to(tl.int32) * weight_C
        weight_ptr += TAPS * weight_stride
        from_RC += 3 * TAPS
    return red, green, blue


@triton.jit
def _word_sums(line_ptr, from_RC, last, weight_ptr, weight_stride, rounds, TAPS: tl.constexpr, BITS: tl.constexpr):
    """As _byte_sums, read in aligned words of four bytes. last: bytes from line_ptr to the last one of the image."""
    red = tl.zeros_like(from_RC) + (1 << (BITS - 1))
    green = red
    blue = red
    WHOLE: tl.constexpr = (3 * TAPS + 3) // 4  # words that the bytes of a window fill when they begin one
    WORDS: tl.constexpr = (3 * TAPS + 6) // 4  # words that they can lie in
    before = (line_ptr.to(tl.int64) & 3).to(tl.int32)
    word_ptr = (line_ptr.to(tl.int64) - before).to(tl.pointer_type(tl.int32))
    last = (last + before) >> 2
    for _ in range(rounds):
        at_RC = from_RC + before
        index_RC = at_RC >> 2
        shift_RC = (at_RC & 3) << 3
        low_RC = tl.load(word_ptr + index_RC)
        for word in tl.static_range(WHOLE):
            if word + 2 < WORDS or (word + 1 < WORDS and 3 * TAPS % 4 == 1):
                high_RC = tl.load(word_ptr + index_RC + (word + 1))
            elif word + 1 < WORDS:  # no byte of the window need lie in this one
                high_RC = tl.load(word_ptr + tl.minimum(index_RC + (word + 1), last))
            both_RC = (high_RC.to(tl.uint32).to(tl.uint64) << 32) | low_RC.to(tl.uint32).to(tl.uint64)
            bytes_RC = (both_RC >> shift_RC.to(tl.uint64)).to(tl.uint32)
            low_RC = high_RC
            for byte in tl.static_range(4):
                place: tl.constexpr = 4 * word + byte
                if place < 3 * TAPS:
                    if place % 3 == 0:
                        weight_C = tl.load(weight_ptr + (place // 3) * weight_stride)[None, :]
                    term_RC = ((bytes_RC >> (8 * byte)) & 255).to(tl.int32) * weight_C
                    if place % 3 == 0:
                        red += term_RC
                    elif place % 3 == 1:
                        green += term_RC
                    else:
                        blue += term_RC
        weight_ptr += TAPS * weight_stride
        from_RC += 3 * TAPS
    return red, green, blue


# One pass across, of interleaved pixels. To "pixels": interleaved again; to "planes": uint8 [3, height, width / PATCH,
# ROOM]; to "patches": values.
@triton.jit(do_not_specialize=["height", "width", "row_bytes", "rounds", "column_blocks"])
def _across_kernel(
    source_ptr,
    out_ptr,
    first_ptr,
    weight_ptr,
    table_ptr,
    height,
    width,
    row_bytes,
    rounds,
    column_blocks,
    source_row,
    out_row,
    out_plane,
    TO: tl.constexpr,
    TAPS: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTED: tl.constexpr,
    FRAMES: tl.constexpr,
    PATCH: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    top = (tl.program_id(0) // column_blocks) * ROWS
    row_R = top + tl.arange(0, ROWS)
    column_C = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    in_RC = (row_R < height)[:, None] & (column_C < width)[None, :]
    near_C = tl.minimum(column_C, width - 1)
    line_R = (tl.minimum(row_R, height - 1) - top) * source_row
    line_ptr = source_ptr + top.to(tl.int64) * source_row
    from_RC = line_R[:, None] + 3 * tl.load(first_ptr + near_C)[None, :]
    if WORDS:
        last = (tl.minimum(height - top, ROWS) - 1) * source_row + (row_bytes - 1)
        red, green, blue = _word_sums(line_ptr, from_RC, last, weight_ptr + near_C, width, rounds, TAPS, BITS)
    else:
        red, green, blue = _byte_sums(line_ptr, from_RC, weight_ptr + near_C, width, rounds, TAPS, BITS)
    red, green, blue = _level(red, BITS), _level(green, BITS), _level(blue, BITS)
    if TO == "patches":
        half_R = row_R // PATCH
        patch_R = (half_R // 2).to(tl.int64) * (width // PATCH * 2) + half_R % 2 * 2
        patch_C = (column_C // (2 * PATCH)).to(tl.int64) * 4 + column_C // PATCH % 2
        SIZE: tl.constexpr = PATCH * PATCH
        to_R = out_ptr + patch_R * (3 * SIZE * FRAMES) + row_R % PATCH * PATCH
        to_RC = to_R[:, None] + (patch_C * (3 * SIZE * FRAMES) + column_C % PATCH)[None, :]
        for frame in tl.static_range(FRAMES):
            tl.store(to_RC + frame * SIZE, _value(red, table_ptr, 0, COMPUTED), mask=in_RC)
            tl.store(to_RC + (FRAMES + frame) * SIZE, _value(green, table_ptr, 1, COMPUTED), mask=in_RC)
            tl.store(to_RC + (2 * FRAMES + frame) * SIZE, _value(blue, table_ptr, 2, COMPUTED), mask=in_RC)
    else:
        to_ptr = out_ptr + top.to(tl.int64) * out_row
        to_R = (row_R - top) * out_row
        if TO == "planes":
            to_C = column_C // PATCH * ROOM + column_C % PATCH
            step = out_plane
        else:
            to_C = 3 * column_C
            step = 1
        to_RC = to_R[:, None] + to_C[None, :]
        tl.store(to_ptr + to_RC, red.to(tl.uint8), mask=in_RC)
        tl.store(to_ptr + step + to_RC, green.to(tl.uint8), mask=in_RC)
        tl.store(to_ptr + 2 * step + to_RC, blue.to(tl.uint8), mask=in_RC)


@triton.jit
def _down_sums(line_ptr, first_R, column_C, in_C, weight_ptr, weight_stride, rounds, source_row, TAPS: tl.constexpr, BITS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """int32 [R, C], sums over the rows first_R.. of line_ptr. weight_ptr: [R] pointers to the first tap's."""
    total_RC = tl.zeros_like(first_R[:, None] + column_C[None, :]) + (1 << (BITS - 1))
    line_R = line_ptr + first_R.to(tl.int64) * source_row
    for _ in range(rounds):
        for tap in tl.static_range(TAPS):
            weight_R = tl.load(weight_ptr + tap * weight_stride)
            from_RC = line_R[:, None] + column_C[None, :]
            if MASKED:
                byte_RC = tl.load(from_RC, mask=in_C[None, :], other=0)
            else:
                byte_RC = tl.load(from_RC)
            total_RC += byte_RC.to(tl.int32) * weight_R[:, None]
            line_R += source_row
        weight_ptr += TAPS * weight_stride
    return total_RC


# One pass down, of bytes whatever they are.
@triton.jit(do_not_specialize=["height", "rounds", "column_blocks"])
def _down_kernel(
    source_ptr,
    out_ptr,
    first_ptr,
    weight_ptr,
    height,
    columns,
    rounds,
    column_blocks,
    source_row,
    out_row,
    TAPS: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row_R = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    column_C = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    in_C = column_C < columns
    near_R = tl.minimum(row_R, height - 1)
    total_RC = _down_sums(
        source_ptr, tl.load(first_ptr + near_R), column_C, in_C, weight_ptr + near_R, height, rounds, source_row, TAPS,
        BITS, True,
    )  # fmt: skip
    to_RC = (out_ptr + row_R.to(tl.int64) * out_row)[:, None] + column_C[None, :]
    tl.store(to_RC, _level(total_RC, BITS).to(tl.uint8), mask=(row_R < height)[:, None] & in_C[None, :])


# The last pass down, of the planes of _across_kernel, to patches: STEPS x ROWS lines of PATCHES patches of one channel.
@triton.jit(do_not_specialize=["height", "patches", "rounds", "patch_blocks"])
def _down_patches_kernel(
    source_ptr,
    out_ptr,
    first_ptr,
    weight_ptr,
    table_ptr,
    height,
    patches,
    rounds,
    patch_blocks,
    source_row,
    source_plane,
    TAPS: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTED: tl.constexpr,
    FRAMES: tl.constexpr,
    PATCH: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    PATCHES: tl.constexpr,
):
    block, rest = tl.program_id(0) % patch_blocks, tl.program_id(0) // patch_blocks
    channel, lines = rest % 3, rest // 3 * (STEPS * ROWS)
    half, y = lines // PATCH, lines % PATCH
    SIZE: tl.constexpr = PATCH * PATCH
    column_C = tl.arange(0, PATCHES * ROOM)
    source_ptr += channel.to(tl.int64) * source_plane + block * (PATCHES * ROOM)
    patch_P = block * PATCHES + tl.arange(0, PATCHES)
    in_PRC = (patch_P < patches)[:, None, None] & (tl.arange(0, ROOM) < PATCH)[None, None, :]
    first_patch = (half // 2).to(tl.int64) * (2 * patches) + half % 2 * 2 + block.to(tl.int64) * (2 * PATCHES)
    out_ptr += (3 * first_patch + channel) * (SIZE * FRAMES)
    offset_P = tl.arange(0, PATCHES)
    to_PRC = (
        ((offset_P // 2 * 4 + offset_P % 2) * (3 * SIZE * FRAMES))[:, None, None]
        + (tl.arange(0, ROWS) * PATCH)[None, :, None]
        + tl.arange(0, ROOM)[None, None, :]
    )
    for step in range(STEPS):
        row_R = lines + step * ROWS + tl.arange(0, ROWS)
        total_RC = _down_sums(
            source_ptr, tl.load(first_ptr + row_R), column_C, column_C, weight_ptr + row_R, height, rounds, source_row,
            TAPS, BITS, False,
        )  # fmt: skip
        value_RC = _value(_level(total_RC, BITS), table_ptr, channel, COMPUTED)
        value_PRC = tl.permute(tl.reshape(value_RC, (ROWS, PATCHES, ROOM)), (1, 0, 2))
        for frame in tl.static_range(FRAMES):
            tl.store(out_ptr + (frame * SIZE + (y + step * ROWS) * PATCH) + to_PRC, value_PRC, mask=in_PRC)
