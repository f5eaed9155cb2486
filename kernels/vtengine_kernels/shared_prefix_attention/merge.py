"""Two attentions of the same queries over different keys become one, by their log-sum-exp: Triton, or torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.triton_runtime import interpreted, launch, missing

if missing() is None:
    import triton
    import triton.language as tl

    # Suffixes: H heads of a block, D head size. Row n of the part belongs to row rows[n] (or first + n) of the whole.
    @triton.jit(do_not_specialize=["first", "num_tokens", "num_rows"])
    def _merge_kernel(
        out_ptr,
        lse_ptr,
        part_ptr,
        part_lse_ptr,
        rows_ptr,
        first,
        num_tokens,
        num_rows,
        HEADS: tl.constexpr,
        SIZE: tl.constexpr,
        INDEXED: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        n = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        d = tl.arange(0, BLOCK_D)
        row = tl.load(rows_ptr + n) if INDEXED else n + first
        real_H = h < HEADS
        real_HD = real_H[:, None] & (d[None, :] < SIZE)
        head_HD = h[:, None] * SIZE + d[None, :]
        old_H = tl.load(lse_ptr + h.to(tl.int64) * num_tokens + row, mask=real_H, other=0.0)
        new_H = tl.load(part_lse_ptr + h.to(tl.int64) * num_rows + n, mask=real_H, other=0.0)
        highest_H = tl.maximum(old_H, new_H)
        total_H = tl.exp(old_H - highest_H) + tl.exp(new_H - highest_H)
        out_HD = tl.load(out_ptr + row * HEADS * SIZE + head_HD, mask=real_HD, other=0.0).to(tl.float32)
        part_HD = tl.load(part_ptr + n * HEADS * SIZE + head_HD, mask=real_HD, other=0.0).to(tl.float32)
        out_HD = out_HD * (tl.exp(old_H - highest_H) / total_H)[:, None]
        out_HD += part_HD * (tl.exp(new_H - highest_H) / total_H)[:, None]
        tl.store(out_ptr + row * HEADS * SIZE + head_HD, out_HD.to(out_ptr.dtype.element_ty), mask=real_HD)
        tl.debug_barrier()  # all threads have read the old log-sum-exps, each for its own columns
        tl.store(lse_ptr + h.to(tl.int64) * num_tokens + row, highest_H + tl.log(total_H), mask=real_H)


def has_triton(x: Tensor) -> bool:
    """Whether the Triton kernel can run on this tensor (TRITON_INTERPRET=1: on the CPU too)."""
    return missing() is None and (x.is_cuda or interpreted())


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: slice | Tensor) -> None:
    """Adds `part` to the rows of `out`, in place. out [T, H, D] and part [N, H, D] contiguous, of one dtype.

    lse [H, T], part_lse [H, N]: float32 log-sum-exp of the scores behind each; `lse` becomes that of both together.
    rows: int64 [N] without repetition, or a range of N rows.
    """
    if has_triton(out):
        _by_triton(out, lse, part, part_lse, rows)
        return
    old = lse[:, rows]
    new = torch.logaddexp(old, part_lse)
    kept, added = ((each - new).exp().t().unsqueeze(2) for each in (old, part_lse))
    out[rows] = (out[rows] * kept + part * added).to(out.dtype)
    lse[:, rows] = new


def blocks(heads: int, size: int) -> dict[str, int]:
    """Block sizes of the kernel: powers of two, about 2,048 values a program."""
    width = max(16, 1 << (size - 1).bit_length())
    return {"BLOCK_H": max(1, min(2048 // width, 1 << (heads - 1).bit_length())), "BLOCK_D": width}


def _by_triton(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: slice | Tensor) -> None:
    count, heads, size = part.shape
    if not count:
        return
    sizes = blocks(heads, size)
    launch(
        _merge_kernel,
        (count, -(-heads // sizes["BLOCK_H"])),
        out,
        lse,
        part,
        part_lse,
        lse if isinstance(rows, slice) else rows,
        rows.start if isinstance(rows, slice) else 0,
        lse.shape[1],
        part_lse.shape[1],
        HEADS=heads,
        SIZE=size,
        INDEXED=isinstance(rows, Tensor),
        **sizes,
    )
