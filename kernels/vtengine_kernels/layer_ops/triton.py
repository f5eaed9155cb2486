"""Norm, gate and rotary embedding on a GPU, each in one launch and one pass over memory, in float32; no gradients.

torch takes two launches for the gate and for a sum that is normed, and four for the rotary embedding. Runs on the CPU
too, under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.triton_runtime import interpreted, launch, missing

__all__ = ["add_rms_norm", "missing", "rms_norm", "rotary", "swiglu", "takes"]

GATE_BLOCK = 1024
HEADS_BLOCK = 32
NORM_BLOCK = 2048  # numbers of a program, or one row where that is longer

if missing() is None:
    import triton
    import triton.language as tl

    # Suffixes: I numbers of a row, G heads, H half a head. fma: as torch rounds, once.
    @triton.jit
    def _swiglu_kernel(x_ptr, out_ptr, row_stride, size, columns, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        i_I = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        row_ptr, real_I = x_ptr + row * row_stride, i_I < size
        gate_I = tl.load(row_ptr + i_I, mask=real_I, other=0.0).to(tl.float32)
        up_I = tl.load(row_ptr + size + i_I, mask=real_I, other=0.0).to(tl.float32)
        out_I = gate_I / (1.0 + tl.exp(-gate_I)) * up_I
        tl.store(out_ptr + row * columns + i_I, out_I.to(out_ptr.dtype.element_ty), mask=i_I < columns)

    # Suffixes: R rows, H numbers of a row. With y, what is normed is the sum, rounded as it is handed on.
    @triton.jit(do_not_specialize=["rows"])
    def _rms_norm_kernel(
        x_ptr, y_ptr, weight_ptr, sum_ptr, out_ptr, rows, size, x_stride, y_stride, eps,
        BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        r_R1 = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        h_1H = tl.arange(0, BLOCK_H)[None, :]
        real_1H = h_1H < size
        real_RH = (r_R1 < rows) & real_1H
        x_RH = tl.load(x_ptr + r_R1 * x_stride + h_1H, mask=real_RH, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y_RH = tl.load(y_ptr + r_R1 * y_stride + h_1H, mask=real_RH, other=0.0).to(tl.float32)
            sum_RH = (x_RH + y_RH).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + r_R1 * size + h_1H, sum_RH, mask=real_RH)
            x_RH = sum_RH.to(tl.float32)
        square_R = tl.sum(x_RH * x_RH, axis=1) / size
        weight_1H = tl.load(weight_ptr + h_1H, mask=real_1H, other=0.0).to(tl.float32)
        out_RH = x_RH * tl.rsqrt(square_R + eps)[:, None] * weight_1H
        tl.store(out_ptr + r_R1 * size + h_1H, out_RH.to(out_ptr.dtype.element_ty), mask=real_RH)

    @triton.jit
    def _rotary_kernel(
        x_ptr, cos_ptr, sin_ptr, out_ptr, row_stride, head_stride, heads,
        HALF: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        g_G1 = (tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G))[:, None]
        h_1H = tl.arange(0, BLOCK_H)[None, :]
        real_1H = h_1H < HALF
        real_GH = (g_G1 < heads) & real_1H
        from_GH = x_ptr + row * row_stride + g_G1 * head_stride + h_1H
        first_GH = tl.load(from_GH, mask=real_GH).to(tl.float32)
        second_GH = tl.load(from_GH + HALF, mask=real_GH).to(tl.float32)
        at_1H = row * 2 * HALF + h_1H
        cos_1H, sin_1H = tl.load(cos_ptr + at_1H, mask=real_1H), tl.load(sin_ptr + at_1H, mask=real_1H)
        to_GH = out_ptr + (row * heads + g_G1) * 2 * HALF + h_1H
        turned_GH = tl.fma(second_GH, tl.broadcast_to(sin_1H, BLOCK_G, BLOCK_H), first_GH * cos_1H)
        tl.store(to_GH, turned_GH.to(out_ptr.dtype.element_ty), mask=real_GH)
        cos_1H = tl.load(cos_ptr + at_1H + HALF, mask=real_1H)
        sin_1H = tl.load(sin_ptr + at_1H + HALF, mask=real_1H)
        turned_GH = tl.fma(first_GH, tl.broadcast_to(sin_1H, BLOCK_G, BLOCK_H), second_GH * cos_1H)
        tl.store(to_GH + HALF, turned_GH.to(out_ptr.dtype.element_ty), mask=real_GH)


def takes(x: Tensor) -> bool:
    """Whether tensors of this kind are implemented, and nobody will ask for gradients."""
    if not (x.is_cuda or interpreted()):  # first, for this is asked on CPUs too, at every call
        return False
    return x.dtype in (torch.float16, torch.bfloat16, torch.float32) and torch.is_inference_mode_enabled()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Contract: the package's docstring, as for the others."""
    return _normed(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _normed(x, y, weight, eps)


def _normed(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    y = y if y is None or y.stride(1) == 1 else y.contiguous()
    rows, size = x.shape
    out = x.new_empty(x.shape)
    total = x if y is None else x.new_empty(x.shape)
    if out.numel():
        shape = norm_blocks(size)
        strides = x.stride(0), x.stride(0) if y is None else y.stride(0)
        tensors = x, y, weight.contiguous(), total, out
        launch(_rms_norm_kernel, (-(-rows // shape["BLOCK_R"]),), *tensors, rows, size, *strides, eps, **shape)
    return total, out


def norm_blocks(size: int) -> dict[str, int]:
    width = 1 << (size - 1).bit_length()
    return {"BLOCK_R": max(1, NORM_BLOCK // width), "BLOCK_H": width, "num_warps": min(16, max(4, width // 512))}


def swiglu(x: Tensor, columns: int | None = None) -> Tensor:
    if x.stride(1) != 1:
        x = x.contiguous()
    size = x.shape[1] // 2
    out = x.new_empty(len(x), columns or size)
    if out.numel():
        grid = (len(x), -(-out.shape[1] // GATE_BLOCK))
        launch(_swiglu_kernel, grid, x, out, x.stride(0), size, out.shape[1], BLOCK=GATE_BLOCK)
    return out


def rotary(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    if x.stride(2) != 1:
        x = x.contiguous()
    rows, heads, size = x.shape
    out = x.new_empty(x.shape)
    if out.numel():
        tables = cos.float().contiguous(), signed_sin.float().contiguous()
        shape = blocks(heads, size)
        grid = (rows, -(-heads // shape["BLOCK_G"]))
        launch(_rotary_kernel, grid, x, *tables, out, x.stride(0), x.stride(1), heads, **shape)
    return out


def blocks(heads: int, size: int) -> dict[str, int]:
    half = size // 2
    group = min(HEADS_BLOCK, 1 << (heads - 1).bit_length())
    return {"HALF": half, "BLOCK_G": group, "BLOCK_H": 1 << (half - 1).bit_length()}
