"""The Triton implementation: one program per row and key head, online softmax over blocks of tokens.

Not split over a row's length: made for batches of rows, where there are programs enough. With siblings: `split`.
Runs on the CPU too, under
TRITON_INTERPRET=1 (set before triton is imported).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.prefix_attention import split
from vtengine_kernels.prefix_attention.siblings import Siblings
from vtengine_kernels.triton_runtime import interpreted, launch, missing

if missing() is None:
    import triton
    import triton.language as tl

    # Suffixes: G query heads of the group, D head size, T tokens of a block; each padded to a block of its own.
    @triton.jit
    def _prefix_attention_fwd_kernel(
        q_ptr,
        keys_ptr,
        values_ptr,
        tables_ptr,
        lengths_ptr,
        out_ptr,
        scale,
        q_stride,
        table_stride,
        page_stride,
        token_stride,
        GROUP: tl.constexpr,
        SIZE: tl.constexpr,
        PAGE: tl.constexpr,
        BLOCK_G: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_T: tl.constexpr,
    ):
        row, head = tl.program_id(0), tl.program_id(1)
        g, d, t = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
        length = tl.load(lengths_ptr + row)
        in_GD = (g[:, None] < GROUP) & (d[None, :] < SIZE)
        head_GD = (head * GROUP + g[:, None]) * SIZE + d[None, :]
        q_GD = tl.load(q_ptr + row.to(tl.int64) * q_stride + head_GD, mask=in_GD, other=0.0)
        highest_G = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
        total_G = tl.zeros((BLOCK_G,), dtype=tl.float32)
        sums_GD = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
        for first in range(0, length, BLOCK_T):
            token_T = first + t
            seen_T = token_T < length
            page_T = tl.load(tables_ptr + row * table_stride + token_T // PAGE, mask=seen_T, other=0)
            at_T = page_T * page_stride + (token_T % PAGE) * token_stride + head * SIZE
            in_TD = seen_T[:, None] & (d[None, :] < SIZE)
            k_TD = tl.load(keys_ptr + at_T[:, None] + d[None, :], mask=in_TD, other=0.0)
            scores_GT = tl.dot(q_GD, tl.trans(k_TD), input_precision="ieee") * scale
            scores_GT = tl.where(seen_T[None, :], scores_GT, float("-inf"))
            new_G = tl.maximum(highest_G, tl.max(scores_GT, axis=1))
            weights_GT = tl.exp(scores_GT - new_G[:, None])
            fade_G = tl.exp(highest_G - new_G)
            v_TD = tl.load(values_ptr + at_T[:, None] + d[None, :], mask=in_TD, other=0.0)
            total_G = total_G * fade_G + tl.sum(weights_GT, axis=1)
            sums_GD = sums_GD * fade_G[:, None]
            sums_GD += tl.dot(weights_GT.to(v_TD.dtype), v_TD, input_precision="ieee")
            highest_G = new_G
        out_GD = (sums_GD / total_G[:, None]).to(out_ptr.dtype.element_ty)
        row_stride = tl.num_programs(1) * GROUP * SIZE
        tl.store(out_ptr + row.to(tl.int64) * row_stride + head_GD, out_GD, mask=in_GD)


def takes(keys: Tensor) -> bool:
    return (keys.is_cuda or interpreted()) and keys.dtype != torch.float64


def blocks(group: int, size: int) -> dict[str, int]:
    """Block sizes of the kernel: powers of two, at least what a matrix product needs."""
    return {
        "BLOCK_G": _padded(group),
        "BLOCK_D": _padded(size),
        "BLOCK_T": 64 if size <= 64 else 32 if size <= 128 else 16,
    }


def prefix_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    siblings: Siblings | None = None,
) -> Tensor:
    """Contract: the package's docstring. All on one device; float16, bfloat16 or float32."""
    if siblings is not None:
        work = siblings.work
        if work is None:
            work = split.work(siblings, lengths.cpu().numpy(), q.device)
        return split.split_attention(q, keys, values, tables, lengths, scale, work)
    if q.stride()[1:] != (q.shape[2], 1):
        q = q.contiguous()
    rows, heads, size = q.shape
    kv_heads, group = keys.shape[2], heads // keys.shape[2]
    out = q.new_empty((rows, heads, size))
    if rows:
        launch(
            _prefix_attention_fwd_kernel,
            (rows, kv_heads),
            q,
            keys,
            values,
            tables,
            lengths,
            out,
            scale,
            q.stride(0),
            tables.stride(0),
            keys.stride(0),
            keys.stride(1),
            GROUP=group,
            SIZE=size,
            PAGE=keys.shape[1],
            **blocks(group, size),
        )
    return out


def _padded(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())
