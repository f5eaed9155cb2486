"""Gate and rotary embedding on a GPU, each in one launch and one pass over memory, in float32; no gradients.

torch takes two launches for the gate, and four for the rotary embedding. Runs on the CPU too, under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.triton_runtime import interpreted, launch, missing

__all__ = ["missing", "rotary", "swiglu", "takes"]

GATE_BLOCK = 1024
HEADS_BLOCK = 32

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
    is_known = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return is_known and torch.is_inference_mode_enabled() and (x.is_cuda or interpreted())


def swiglu(x: Tensor, columns: int | None = None) -> Tensor:
    """Contract: the package's docstring, as for the other."""
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
