"""The Triton implementation: a program per row, block of queries and key head; all query heads of the group together.

Keys and values are so read once for the whole group. Runs on the CPU too, under TRITON_INTERPRET=1 (set before triton
is imported).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtengine_kernels.triton_runtime import generation, interpreted, launch, missing

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

    # Suffixes: M pairs of a query and a head of the group, D head size, T tokens of a block.
    @triton.jit(do_not_specialize=["table_stride"])
    def _paged_prefill_kernel(
        q_ptr,
        keys_ptr,
        values_ptr,
        tables_ptr,
        lengths_ptr,
        offsets_ptr,
        out_ptr,
        scale_log2,
        q_stride,
        out_stride,
        table_stride,
        page_stride,
        token_stride,
        GROUP: tl.constexpr,
        SIZE: tl.constexpr,
        PAGE: tl.constexpr,
        QUERIES: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_T: tl.constexpr,
    ):
        # a row's blocks of queries follow each other, for they read the same; those that see most come first, or the
        # device would wait for the longest at the end
        row, head = tl.program_id(2), tl.program_id(1)
        first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
        begin, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
        count = (end - begin).to(tl.int32)
        if first_query < count:
            length = tl.load(lengths_ptr + row).to(tl.int32)
            m, d, t = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
            query_M = first_query + m // GROUP
            real_M = (m < QUERIES * GROUP) & (query_M < count)
            limit_M = tl.where(real_M, length - count + query_M, 0)  # the last token that a query sees
            in_MD = real_M[:, None] & (d[None, :] < SIZE)
            column_MD = (head * GROUP + m % GROUP)[:, None] * SIZE + d[None, :]
            q_MD = tl.load(q_ptr + (begin + query_M)[:, None] * q_stride + column_MD, mask=in_MD, other=0.0)
            highest_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            total_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
            sums_MD = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
            seen_tokens = length - count + tl.minimum(first_query + QUERIES, count)
            seen_by_all = (length - count + first_query + 1) // BLOCK_T * BLOCK_T  # whole blocks, without a mask
            keys_D, values_D = keys_ptr + head * SIZE + d, values_ptr + head * SIZE + d
            table_ptr = tables_ptr + row.to(tl.int64) * table_stride
            # A block's pages are loaded one block ahead, or loads of keys and values would wait for them and be waited
            # for. Unsigned: products of 32 bits and shifts are one instruction then.
            for MASKED in tl.static_range(2):
                first_block, blocks_end = seen_by_all if MASKED else 0, seen_tokens if MASKED else seen_by_all
                token_T = first_block + t
                there_T = token_T < seen_tokens
                page_T = tl.load(table_ptr + token_T.to(tl.uint32) // PAGE, mask=there_T, other=0).to(tl.uint32)
                for first in range(first_block, blocks_end, BLOCK_T):
                    token_T = first + t
                    there_T = token_T < seen_tokens
                    slot_T = (token_T.to(tl.uint32) % PAGE).to(tl.int32)
                    at_T = page_T.to(tl.int64) * tl.cast(page_stride, tl.uint32) + slot_T * token_stride
                    next_T = (first + BLOCK_T if MASKED else tl.minimum(first + BLOCK_T, seen_by_all - BLOCK_T)) + t
                    page_T = _load(table_ptr + next_T.to(tl.uint32) // PAGE, next_T < seen_tokens, MASKED).to(tl.uint32)
                    in_TD = there_T[:, None] & (d[None, :] < SIZE)
                    k_TD = _load(keys_D[None, :] + at_T[:, None], in_TD, MASKED or SIZE < BLOCK_D)
                    scores_MT = tl.dot(q_MD, tl.trans(k_TD), input_precision="ieee")
                    if MASKED:
                        scores_MT = tl.where(token_T[None, :] <= limit_M[:, None], scores_MT, float("-inf"))
                    new_M = tl.maximum(highest_M, tl.max(scores_MT, axis=1) * scale_log2)
                    weights_MT = tl.exp2(scores_MT * scale_log2 - new_M[:, None])
                    fade_M = tl.exp2(highest_M - new_M)
                    v_TD = _load(values_D[None, :] + at_T[:, None], in_TD, MASKED or SIZE < BLOCK_D)
                    total_M = total_M * fade_M + tl.sum(weights_MT, axis=1)
                    sums_MD = sums_MD * fade_M[:, None]
                    sums_MD += tl.dot(weights_MT.to(v_TD.dtype), v_TD, input_precision="ieee")
                    highest_M = new_M
            out_MD = (sums_MD / total_M[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + (begin + query_M)[:, None] * out_stride + column_MD, out_MD, mask=in_MD)


def takes(keys: Tensor) -> bool:
    return (keys.is_cuda or interpreted()) and keys.dtype != torch.float64 and keys.shape[3] <= 128


def blocks(group: int, size: int, itemsize: int, major: int) -> dict[str, int]:
    """QUERIES of a block and the block sizes, powers of two of at least 16; larger ones spill registers.

    major: of the device's compute capability. A key and a value are read for BLOCK_M rows: 4 * BLOCK_M operations for
    2 * itemsize bytes. At 64 rows of 16 bits a Hopper's second-level cache (about 5.5 TB/s) would hold the tensor cores
    at a third of their rate; and at 32 tokens shared memory would, which gives them 128 bytes a cycle.
    """
    block_m = max(128 if itemsize == 2 else 32, _padded(group))
    return {
        "QUERIES": block_m // group,
        "BLOCK_M": block_m,
        "BLOCK_D": _padded(size),
        "BLOCK_T": 16 if itemsize == 4 else 64 if major in (9, 10) else 32,
    }


def warps(block_m: int) -> int:
    """Of a program: 16 rows for each, a tensor core's least; float32 spills with fewer than 8 warps."""
    return max(8, block_m // 16)


def paged_prefill(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, offsets: Tensor, longest: int
) -> Tensor:
    """Contract: the package's docstring. All on one device."""
    q = q if q.stride()[1:] == (q.shape[2], 1) else q.contiguous()
    tokens, heads, size = q.shape
    kv_heads, group = keys.shape[2], heads // keys.shape[2]
    out = q.new_empty((tokens, heads, size))
    sizes = blocks(group, size, q.element_size(), generation(q))
    if tokens:
        launch(
            _paged_prefill_kernel,
            (-(-longest // sizes["QUERIES"]), kv_heads, len(lengths)),
            q,
            keys,
            values,
            tables,
            lengths,
            offsets,
            out,
            size**-0.5 * LOG2_E,
            q.stride(0),
            out.stride(0),
            tables.stride(0),
            keys.stride(0),
            keys.stride(1),
            GROUP=group,
            SIZE=size,
            PAGE=keys.shape[1],
            num_warps=warps(sizes["BLOCK_M"]),
            **sizes,
        )
    return out


def _padded(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())
