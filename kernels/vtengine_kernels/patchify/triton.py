"""The Triton implementation: the image goes up as bytes, one or two kernels per resize, values come out as patches.

A resize is one pass per direction that changes. All passes but the last write 8-bit planes; the last one of the last
resize also looks the levels up in the table of values and writes patches. Weights, sums and table are those of the
reference, so the result is too. Runs on the CPU as well, under TRITON_INTERPRET=1 (set before triton is imported).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtengine_kernels.patchify.contract import FRAMES, Plan
from vtengine_kernels.patchify.fixed_point import PRECISION_BITS, Filter, Mode, vertical_first, weights
from vtengine_kernels.triton_runtime import launch, missing

BLOCK = {"BLOCK_R": 16, "BLOCK_C": 128}  # rows and columns of one program; a patch's rows where it writes patches
NUM_WARPS = 8

if missing() is None:
    import triton
    import triton.language as tl

    # Suffixes: R rows, C columns of the output. The three channels of a place are neighbours in time: they share what
    # is read of interleaved pixels.
    @triton.jit
    def _levels(
        source_ptr,
        first_ptr,
        weight_ptr,
        row_R,
        column_C,
        in_R,
        in_C,
        taps,
        tap_stride,
        source_row,
        source_pixel,
        ACROSS: tl.constexpr,
        BITS: tl.constexpr,
    ):
        """int32 0..255, the outputs (row_R, column_C) of one pass over one channel."""
        in_RC = in_R[:, None] & in_C[None, :]
        total_RC = tl.zeros_like(in_RC.to(tl.int32)) + (1 << (BITS - 1))
        if ACROSS:
            first_C = tl.load(first_ptr + column_C, mask=in_C, other=0)
            line_R = source_ptr + row_R.to(tl.int64) * source_row
            from_RC = line_R[:, None] + (first_C * source_pixel)[None, :]
            for tap in range(taps):
                weight_C = tl.load(weight_ptr + tap * tap_stride + column_C, mask=in_C, other=0)
                total_RC += tl.load(from_RC, mask=in_RC, other=0).to(tl.int32) * weight_C[None, :]
                from_RC += source_pixel
        else:
            first_R = tl.load(first_ptr + row_R, mask=in_R, other=0)
            line_R = source_ptr + first_R.to(tl.int64) * source_row
            from_RC = line_R[:, None] + (column_C * source_pixel)[None, :]
            for tap in range(taps):
                weight_R = tl.load(weight_ptr + tap * tap_stride + row_R, mask=in_R, other=0)
                total_RC += tl.load(from_RC, mask=in_RC, other=0).to(tl.int32) * weight_R[:, None]
                from_RC += source_row
        return tl.minimum(tl.maximum(total_RC >> BITS, 0), 255)

    # Levels to planes of levels.
    @triton.jit(do_not_specialize=["height", "taps", "tap_stride"])
    def _pass_kernel(
        source_ptr,
        first_ptr,
        weight_ptr,
        out_ptr,
        height,
        columns,
        taps,
        tap_stride,
        source_channel,
        source_row,
        source_pixel,
        out_channel,
        out_row,
        ACROSS: tl.constexpr,
        BITS: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        channel = (tl.program_id(0) % 3).to(tl.int64)
        row_R = tl.program_id(0) // 3 * BLOCK_R + tl.arange(0, BLOCK_R)
        column_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        in_R, in_C = row_R < height, column_C < columns
        source_ptr += channel * source_channel
        level_RC = _levels(
            source_ptr, first_ptr, weight_ptr, row_R, column_C, in_R, in_C, taps, tap_stride, source_row, source_pixel,
            ACROSS, BITS,
        )  # fmt: skip
        out_R = out_ptr + channel * out_channel + row_R.to(tl.int64) * out_row
        # up to the end of a line's room, whose size is even, so that stores can be wide
        in_RC = in_R[:, None] & (column_C < out_row)[None, :]
        tl.store(out_R[:, None] + column_C[None, :], level_RC.to(tl.uint8), mask=in_RC)

    # Levels to patches. One program makes PATCH lines of one channel: the upper or lower half of some windows of a row.
    @triton.jit(do_not_specialize=["width", "taps", "tap_stride"])
    def _patches_kernel(
        source_ptr,
        first_ptr,
        weight_ptr,
        table_ptr,
        out_ptr,
        width,
        columns,
        taps,
        tap_stride,
        source_channel,
        source_row,
        source_pixel,
        ACROSS: tl.constexpr,
        BITS: tl.constexpr,
        FRAMES: tl.constexpr,
        PATCH: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        half, channel = tl.program_id(0) // 3, tl.program_id(0) % 3
        y_R = tl.arange(0, BLOCK_R)
        column_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        in_R, in_C = y_R < PATCH, column_C < columns
        source_ptr += channel.to(tl.int64) * source_channel
        level_RC = _levels(
            source_ptr, first_ptr, weight_ptr, half * PATCH + y_R, column_C, in_R, in_C, taps, tap_stride, source_row,
            source_pixel, ACROSS, BITS,
        )  # fmt: skip
        in_RC = in_R[:, None] & (column_C < width)[None, :]
        value_RC = tl.load(table_ptr + channel * 256 + level_RC, mask=in_RC, other=0)
        window_C, x_C = column_C // (2 * PATCH), column_C % (2 * PATCH)
        patch_C = ((half // 2) * (width // (2 * PATCH)) + window_C) * 4 + (half % 2) * 2 + x_C // PATCH
        SIZE: tl.constexpr = PATCH * PATCH
        to_C = out_ptr + patch_C.to(tl.int64) * (3 * SIZE * FRAMES) + channel * (SIZE * FRAMES) + column_C % PATCH
        for frame in tl.static_range(FRAMES):
            tl.store(to_C[None, :] + (frame * SIZE + y_R * PATCH)[:, None], value_RC, mask=in_RC)


def run(plan: Plan) -> list[Tensor]:
    """Writes every target of the plan into its output tensor and returns these."""
    pixels_CHW = upload(plan.image, plan.device).permute(2, 0, 1)
    for target, (left, top, right, bottom), out in zip(plan.targets, plan.boxes, plan.outputs, strict=True):
        planes = pixels_CHW[:, top:bottom, left:right]
        for step in target.before:
            for axis in passes(planes, step.height, step.width, plan.mode):
                planes = _resampled(planes, axis, (step.height, step.width)[axis], step.filter, plan.mode)
        *earlier, last = passes(planes, target.height, target.width, plan.mode) or [0]
        for axis in earlier:
            planes = _resampled(planes, axis, (target.height, target.width)[axis], plan.filter, plan.mode)
        _write_patches(planes, last, target.height, target.width, plan, out)
    return list(plan.outputs)


def upload(image: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """uint8 [H, W, 3] on the device, by way of pinned memory, which torch keeps and uses again."""
    if isinstance(image, Tensor):
        return image
    staged = torch.empty(image.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.copyto(staged.numpy(), image)
    return staged.to(device, non_blocking=True)


def passes(planes: Tensor, height: int, width: int, mode: Mode) -> list[int]:
    """The directions that a resize of [3, H, W] changes, in order: 0 down, 1 across."""
    _, height_in, width_in = planes.shape
    axes = [0, 1] if vertical_first(height_in, width_in, height, width, mode) else [1, 0]
    return [axis for axis in axes if (height_in, width_in)[axis] != (height, width)[axis]]


def _resampled(planes: Tensor, axis: int, size: int, kind: Filter, mode: Mode) -> Tensor:
    """uint8 [3, H, W] with one direction resampled to `size`; lines begin at multiples of 16 bytes."""
    _, height_in, width_in = planes.shape
    height, width = (size, width_in) if axis == 0 else (height_in, size)
    out = planes.new_empty((3, height, -(-width // 16) * 16))[:, :, :width]
    first, weight = _axis((height_in, width_in)[axis], size, kind, mode, planes.device)
    grid = (3 * -(-height // BLOCK["BLOCK_R"]), -(-width // BLOCK["BLOCK_C"]))
    launch(
        _pass_kernel,
        grid,
        planes,
        first,
        weight,
        out,
        height,
        _readable(planes) if axis == 0 else width,
        weight.shape[0],
        weight.stride(0),
        *planes.stride(),
        *out.stride()[:2],
        ACROSS=axis == 1,
        BITS=PRECISION_BITS,
        **BLOCK,
        num_warps=NUM_WARPS,
    )
    return out


def _write_patches(planes: Tensor, axis: int, height: int, width: int, plan: Plan, out: Tensor) -> None:
    """The last pass; where the size stays, it multiplies by one."""
    first, weight = _axis(planes.shape[1 + axis], (height, width)[axis], plan.filter, plan.mode, planes.device)
    grid = (3 * (height // plan.patch), -(-width // BLOCK["BLOCK_C"]))
    bits = torch.int16 if out.dtype == torch.bfloat16 else torch.int32  # the kernel moves values and looks at none
    launch(
        _patches_kernel,
        grid,
        planes,
        first,
        weight,
        _table(plan.table.tobytes(), out.dtype, planes.device).view(bits),
        out.view(bits),
        width,
        _readable(planes) if axis == 0 else width,
        weight.shape[0],
        weight.stride(0),
        *planes.stride(),
        ACROSS=axis == 1,
        BITS=PRECISION_BITS,
        FRAMES=FRAMES[plan.layout],
        PATCH=plan.patch,
        **BLOCK,
        num_warps=NUM_WARPS,
    )


def _readable(planes: Tensor) -> int:
    """Pixels of a line that may be read: of our own planes all there is room for, an even number, for wide loads."""
    return planes.stride(1) if planes.stride(2) == 1 else planes.shape[2]


@functools.lru_cache(maxsize=256)
def _axis(size_in: int, size_out: int, kind: Filter, mode: Mode, device: torch.device) -> tuple[Tensor, Tensor]:
    """(first [size_out], weight [taps, size_out]), int32: as `weights` gives them, but no tap lies past the input."""
    if size_in == size_out:
        first, weight = np.arange(size_out), np.full((size_out, 1), 1 << PRECISION_BITS)
    else:
        first, weight = inside(*weights(size_in, size_out, kind, mode), size_in)
    tensors: Any = (torch.from_numpy(array.astype(np.int32)).to(device) for array in (first, weight.T.copy()))
    return tuple(tensors)


def inside(first: np.ndarray, weight: np.ndarray, size_in: int) -> tuple[np.ndarray, np.ndarray]:
    """The same sums, with first + taps <= size_in: windows that stick out are moved back."""
    back = np.maximum(first + weight.shape[1] - size_in, 0)
    moved = np.arange(weight.shape[1])[None, :] - back[:, None]
    return first - back, np.where(moved >= 0, np.take_along_axis(weight, np.maximum(moved, 0), axis=1), 0)


@functools.lru_cache(maxsize=16)
def _table(values: bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[3 * 256], the values of the levels as the output has them."""
    return torch.from_numpy(np.frombuffer(values, np.float32).copy()).to(dtype).to(device)
