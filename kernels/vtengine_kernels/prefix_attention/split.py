"""The Triton implementation for siblings: what rows have in common is read once for up to ROWS of them.

A program takes one span of SPAN tokens, one key head and the rows that share this span (or one row): their queries are
the rows of one matrix product. Each row's parts are then merged, span by span. A row's part of a span is computed alike
whether it shares the span or not, so the rows of a batch do not change each other's results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vtengine_kernels.triton_runtime import launch, missing

if TYPE_CHECKING:
    from vtengine_kernels.prefix_attention.siblings import Siblings

SPAN = 256
ROWS = 8

if missing() is None:
    import triton
    import triton.language as tl

    # Suffixes: M pairs of a row and a query head of the group, D head size, T tokens of a block.
    @triton.jit
    def _span_kernel(
        q_ptr,
        keys_ptr,
        values_ptr,
        tables_ptr,
        lengths_ptr,
        items_ptr,
        parts_ptr,
        lse_ptr,
        scale,
        q_stride,
        table_stride,
        page_stride,
        token_stride,
        most_spans,
        GROUP: tl.constexpr,
        SIZE: tl.constexpr,
        PAGE: tl.constexpr,
        SPAN: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_T: tl.constexpr,
    ):
        item_ptr, head = items_ptr + tl.program_id(0) * (ROWS + 1), tl.program_id(1)
        span, first_row = tl.load(item_ptr), tl.load(item_ptr + 1)
        if first_row >= 0:
            m, d, t = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
            row_M = tl.load(item_ptr + 1 + m // GROUP, mask=m < ROWS * GROUP, other=-1)
            real_M = row_M >= 0
            row_M = tl.where(real_M, row_M, first_row)
            head_M = head * GROUP + m % GROUP
            in_MD = real_M[:, None] & (d[None, :] < SIZE)
            at_MD = row_M[:, None] * q_stride + head_M[:, None] * SIZE + d[None, :]
            q_MD = tl.load(q_ptr + at_MD, mask=in_MD, other=0.0)
            highest_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            total_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
            sums_MD = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
            # rows that share a span have all of it: the first one's length stands for all
            end = tl.minimum(tl.load(lengths_ptr + first_row), (span + 1) * SPAN)
            for first in range(span * SPAN, end, BLOCK_T):
                token_T = first + t
                there_T = token_T < end
                page_T = tl.load(tables_ptr + first_row * table_stride + token_T // PAGE, mask=there_T, other=0)
                at_T = page_T * page_stride + (token_T % PAGE) * token_stride + head * SIZE
                in_TD = there_T[:, None] & (d[None, :] < SIZE)
                k_TD = tl.load(keys_ptr + at_T[:, None] + d[None, :], mask=in_TD, other=0.0)
                scores_MT = tl.dot(q_MD, tl.trans(k_TD), input_precision="ieee") * scale
                scores_MT = tl.where(there_T[None, :], scores_MT, float("-inf"))
                new_M = tl.maximum(highest_M, tl.max(scores_MT, axis=1))
                weights_MT = tl.exp(scores_MT - new_M[:, None])
                fade_M = tl.exp(highest_M - new_M)
                v_TD = tl.load(values_ptr + at_T[:, None] + d[None, :], mask=in_TD, other=0.0)
                total_M = total_M * fade_M + tl.sum(weights_MT, axis=1)
                sums_MD = sums_MD * fade_M[:, None]
                sums_MD += tl.dot(weights_MT.to(v_TD.dtype), v_TD, input_precision="ieee")
                highest_M = new_M
            heads = tl.num_programs(1) * GROUP
            part_M = (row_M * most_spans + span) * heads + head_M
            tl.store(parts_ptr + part_M[:, None] * SIZE + d[None, :], sums_MD / total_M[:, None], mask=in_MD)
            tl.store(lse_ptr + part_M, highest_M + tl.log(total_M), mask=real_M)

    # Suffixes: D head size. A program merges the parts of one row and one query head, in order.
    @triton.jit
    def _merge_spans_kernel(
        parts_ptr,
        lse_ptr,
        lengths_ptr,
        out_ptr,
        most_spans,
        SIZE: tl.constexpr,
        SPAN: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        heads = tl.num_programs(1)
        d = tl.arange(0, BLOCK_D)
        highest, total = float("-inf"), 0.0
        sums_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for span in range(0, tl.cdiv(tl.load(lengths_ptr + row), SPAN)):
            part = (row * most_spans + span) * heads + head
            lse = tl.load(lse_ptr + part)
            part_D = tl.load(parts_ptr + part * SIZE + d, mask=d < SIZE, other=0.0)
            new = tl.maximum(highest, lse)
            fade, weight = tl.exp(highest - new), tl.exp(lse - new)
            sums_D = sums_D * fade + part_D * weight
            total = total * fade + weight
            highest = new
        out_D = (sums_D / total).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row * heads + head) * SIZE + d, out_D, mask=d < SIZE)


def work(siblings: Siblings, lengths: np.ndarray, device: torch.device) -> Tensor:
    """`items` on a device."""
    return torch.from_numpy(items(siblings, lengths)).to(device)


def items(siblings: Siblings, lengths: np.ndarray) -> np.ndarray:
    """int64 [W, 1 + ROWS]: each a span and the rows that share it, -1 where there are no more. lengths [N]."""
    order = siblings.order.numpy()
    lengths = lengths[order]
    shared = np.minimum(siblings.shared.numpy(), np.minimum(lengths, np.roll(lengths, 1)))
    ends = SPAN * np.arange(1, 1 + -(-int(lengths.max(initial=0)) // SPAN))[:, None]
    active = ends - SPAN < lengths
    begins = active & ((shared < ends) | (np.arange(len(order)) == 0))
    place = np.arange(len(order)) - np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0), axis=1)
    span, n = np.nonzero(active)
    column = place[span, n] % ROWS
    item = np.cumsum(column == 0) - 1
    found = np.full((item[-1] + 1 if len(item) else 0, 1 + ROWS), -1, dtype=np.int64)
    found[item, 0], found[item, 1 + column] = span, order[n]
    return found


def blocks(group: int, size: int, itemsize: int) -> dict[str, int]:
    """Block sizes of the kernel: powers of two, at least what a matrix product needs; larger ones spill registers."""
    return {
        "BLOCK_M": max(16, _padded(ROWS * group)),
        "BLOCK_D": max(16, _padded(size)),
        "BLOCK_T": 32 if itemsize == 2 and size <= 64 else 16,
    }


def split_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float, work: Tensor
) -> Tensor:
    """As `prefix_attention`, with what `items` found on q's device. Nothing is read back: it can be captured."""
    q = q if q.stride()[1:] == (q.shape[2], 1) else q.contiguous()
    rows, heads, size = q.shape
    kv_heads, group = keys.shape[2], heads // keys.shape[2]
    out = q.new_empty((rows, heads, size))
    most_spans = -(-tables.shape[1] * keys.shape[1] // SPAN)
    parts = torch.empty((rows, most_spans, heads, size), dtype=torch.float32, device=q.device)
    lse = torch.empty((rows, most_spans, heads), dtype=torch.float32, device=q.device)
    sizes = blocks(group, size, q.element_size())
    if rows:
        launch(
            _span_kernel,
            (len(work), kv_heads),
            q,
            keys,
            values,
            tables,
            lengths,
            work,
            parts,
            lse,
            scale,
            q.stride(0),
            tables.stride(0),
            keys.stride(0),
            keys.stride(1),
            most_spans,
            GROUP=group,
            SIZE=size,
            PAGE=keys.shape[1],
            SPAN=SPAN,
            ROWS=ROWS,
            **sizes,
        )
        merge = {"SIZE": size, "SPAN": SPAN, "BLOCK_D": sizes["BLOCK_D"]}
        launch(_merge_spans_kernel, (rows, heads), parts, lse, lengths, out, most_spans, **merge)
    return out


def _padded(count: int) -> int:
    return 1 << (count - 1).bit_length()
