"""The Triton kernels: every row is split into spans of SPAN tokens, so that few long rows occupy a GPU as well.

A program takes one span, one key head and one row, or with siblings the up to ROWS rows that share the span: their
queries are the rows of one matrix product, and keys and values are read once for all of them. Each row's parts are then
merged, in order. A row's part of a span is computed alike whether it shares the span or not, and the spans of a row
depend on its own length only, so the rows of a batch do not change each other's results.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vtengine_kernels.triton_runtime import generation, launch, missing

if TYPE_CHECKING:
    from vtengine_kernels.prefix_attention.siblings import Siblings

SPAN = 512
ROWS = 8
LOG2_E = math.log2(math.e)

if missing() is None:
    import triton
    import triton.language as tl

    @triton.jit
    def _load(at, mask, MASKED: tl.constexpr):
        if MASKED:
            return tl.load(at, mask=mask, other=0.0)
        else:
            return tl.load(at)

    # Suffixes: M pairs of a row and a query head of the group, D head size, T tokens of a block.
    @triton.jit(do_not_specialize=["table_stride", "most_spans"])
    def _span_kernel(
        q_ptr,
        keys_ptr,
        values_ptr,
        tables_ptr,
        lengths_ptr,
        items_ptr,
        parts_ptr,
        lse_ptr,
        scale_log2,
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
        head, m = tl.program_id(1), tl.arange(0, BLOCK_M)
        if items_ptr is None:  # every row for itself
            span, first_row = tl.program_id(2), tl.program_id(0).to(tl.int64)
            row_M = tl.where(m < GROUP, first_row, -1)
        else:
            item_ptr = items_ptr + tl.program_id(0) * (ROWS + 1)
            span, first_row = tl.load(item_ptr).to(tl.int32), tl.load(item_ptr + 1)
            row_M = tl.load(item_ptr + 1 + m // GROUP, mask=m < ROWS * GROUP, other=-1)
        # rows that share a span have all of it: the first one's length stands for all
        begin = span * SPAN
        end = tl.load(lengths_ptr + first_row, mask=first_row >= 0, other=0).to(tl.int32)
        if (first_row >= 0) & (begin < end):
            d, t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
            real_M = row_M >= 0
            row_M = tl.where(real_M, row_M, first_row)
            head_M = head * GROUP + m % GROUP
            in_MD = real_M[:, None] & (d[None, :] < SIZE)
            at_MD = row_M[:, None] * q_stride + head_M[:, None] * SIZE + d[None, :]
            q_MD = tl.load(q_ptr + at_MD, mask=in_MD, other=0.0)
            highest_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            totals_MT = tl.zeros((BLOCK_M, BLOCK_T), dtype=tl.float32)  # summed at the end: warps need not meet
            sums_MD = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
            end = tl.minimum(end, begin + SPAN)
            whole_end = begin + (end - begin) // BLOCK_T * BLOCK_T  # whole blocks, without a mask
            keys_D, values_D = keys_ptr + head * SIZE + d, values_ptr + head * SIZE + d
            table_ptr = tables_ptr + first_row * table_stride
            # A block's pages are loaded one block ahead, or loads of keys and values would wait for them and be waited
            # for. Unsigned: products of 32 bits and shifts are one instruction then.
            for MASKED in tl.static_range(2):
                first_block, blocks_end = whole_end if MASKED else begin, end if MASKED else whole_end
                token_T = first_block + t
                page_T = tl.load(table_ptr + token_T.to(tl.uint32) // PAGE, mask=token_T < end, other=0).to(tl.uint32)
                for first in range(first_block, blocks_end, BLOCK_T):
                    token_T = first + t
                    there_T = token_T < end
                    slot_T = (token_T.to(tl.uint32) % PAGE).to(tl.int32)
                    at_T = page_T.to(tl.int64) * tl.cast(page_stride, tl.uint32) + slot_T * token_stride
                    next_T = (first + BLOCK_T if MASKED else tl.minimum(first + BLOCK_T, whole_end - BLOCK_T)) + t
                    page_T = _load(table_ptr + next_T.to(tl.uint32) // PAGE, next_T < end, MASKED).to(tl.uint32)
                    in_TD = there_T[:, None] & (d[None, :] < SIZE)
                    k_TD = _load(keys_D[None, :] + at_T[:, None], in_TD, MASKED or SIZE < BLOCK_D)
                    scores_MT = tl.dot(q_MD, tl.trans(k_TD), input_precision="ieee")
                    if MASKED:
                        scores_MT = tl.where(there_T[None, :], scores_MT, float("-inf"))
                    new_M = tl.maximum(highest_M, tl.max(scores_MT, axis=1) * scale_log2)
                    weights_MT = tl.exp2(scores_MT * scale_log2 - new_M[:, None])
                    fade_M = tl.exp2(highest_M - new_M)
                    v_TD = _load(values_D[None, :] + at_T[:, None], in_TD, MASKED or SIZE < BLOCK_D)
                    totals_MT = totals_MT * fade_M[:, None] + weights_MT
                    sums_MD = sums_MD * fade_M[:, None]
                    sums_MD += tl.dot(weights_MT.to(v_TD.dtype), v_TD, input_precision="ieee")
                    highest_M = new_M
            total_M = tl.sum(totals_MT, axis=1)
            heads = tl.num_programs(1) * GROUP
            part_M = (row_M * most_spans + span) * heads + head_M
            tl.store(parts_ptr + part_M[:, None] * SIZE + d[None, :], sums_MD / total_M[:, None], mask=in_MD)
            tl.store(lse_ptr + part_M, highest_M + tl.log2(total_M), mask=real_M)

    # Suffixes: S spans of a block, D head size. A program merges the parts of one row and one query head, in order.
    @triton.jit(do_not_specialize=["most_spans"])
    def _merge_spans_kernel(
        parts_ptr,
        lse_ptr,
        lengths_ptr,
        out_ptr,
        most_spans,
        SIZE: tl.constexpr,
        SPAN: tl.constexpr,
        BLOCK_S: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        heads, spans = tl.num_programs(1), tl.cdiv(tl.load(lengths_ptr + row), SPAN)
        s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
        highest, total = float("-inf"), 0.0
        sums_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for first in range(0, spans, BLOCK_S):
            there_S = first + s < spans
            part_S = (row * most_spans + first + s) * heads + head
            lse_S = tl.load(lse_ptr + part_S, mask=there_S, other=float("-inf"))
            in_SD = there_S[:, None] & (d[None, :] < SIZE)
            part_SD = tl.load(parts_ptr + part_S[:, None] * SIZE + d[None, :], mask=in_SD, other=0.0)
            new = tl.maximum(highest, tl.max(lse_S, axis=0))
            fade, weight_S = tl.exp2(highest - new), tl.exp2(lse_S - new)
            sums_D = sums_D * fade + tl.sum(part_SD * weight_S[:, None], axis=0)
            total = total * fade + tl.sum(weight_S, axis=0)
            highest = new
        out_D = (sums_D / total).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row * heads + head) * SIZE + d, out_D, mask=d < SIZE)


def work(siblings: Siblings, lengths: np.ndarray, device: torch.device) -> Tensor:
    """`items` on a device, from pinned memory, or the host would wait for what runs there."""
    found = torch.from_numpy(items(siblings, lengths))
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


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


def blocks(rows: int, group: int, size: int, itemsize: int, major: int) -> dict[str, int]:
    """Block sizes for that many rows in one program: powers of two, at least what a matrix product needs; larger ones
    spill registers. major: of the device's compute capability; others than 9 and 10 lack shared memory for 64 tokens
    beside siblings.
    """
    block_m = _padded(rows * group)
    block_t = 64 if rows == 1 or (block_m <= 64 and major in (9, 10)) else 32
    if size > 128 or itemsize == 4:
        block_t = 32 if size <= 64 or (rows == 1 and itemsize == 2) else 16
    return {"BLOCK_M": block_m, "BLOCK_D": _padded(size), "BLOCK_T": block_t}


def merge_blocks(size: int) -> dict[str, int]:
    """Of the kernel that merges: as many spans at a time as the registers of its one warp hold."""
    block_d = _padded(size)
    return {"BLOCK_S": 2048 // block_d, "BLOCK_D": block_d}


def split_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float, work: Tensor | None
) -> Tensor:
    """As `prefix_attention`; work: what `items` found, on q's device, or None. Nothing is read back: it can be
    captured. Programs are started for as many spans as the tables could hold; those past a row's end do nothing.
    """
    q = q if q.stride()[1:] == (q.shape[2], 1) else q.contiguous()
    rows, heads, size = q.shape
    kv_heads, group = keys.shape[2], heads // keys.shape[2]
    out = q.new_empty((rows, heads, size))
    most_spans = -(-tables.shape[1] * keys.shape[1] // SPAN)
    parts = torch.empty((rows, most_spans, heads, size), dtype=torch.float32, device=q.device)
    lse = torch.empty((rows, most_spans, heads), dtype=torch.float32, device=q.device)
    together = 1 if work is None else ROWS
    sizes = blocks(together, group, size, q.element_size(), generation(q))
    if rows:
        launch(
            _span_kernel,
            (rows, kv_heads, most_spans) if work is None else (len(work), kv_heads),
            q,
            keys,
            values,
            tables,
            lengths,
            work,
            parts,
            lse,
            scale * LOG2_E,
            q.stride(0),
            tables.stride(0),
            keys.stride(0),
            keys.stride(1),
            most_spans,
            GROUP=group,
            SIZE=size,
            PAGE=keys.shape[1],
            SPAN=SPAN,
            ROWS=together,
            **sizes,
        )
        merge = {"SIZE": size, "SPAN": SPAN, "num_warps": 1, **merge_blocks(size)}
        launch(_merge_spans_kernel, (rows, heads), parts, lse, lengths, out, most_spans, **merge)
    return out


def _padded(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())
