"""paged_prefill: rows of many query tokens, each row over the cached keys and values of its own sequence.

Row n has the queries offsets[n] .. offsets[n + 1] - 1 of the pass, which are the last of the lengths[n] tokens of its
sequence: the i-th of c queries sees tokens 0 .. lengths[n] - c + i. Token t lies in page tables[n, t // page_size] at
t % page_size. Query head h reads key head h * Hkv // Hq. Nothing is gathered: pages are read where they are.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from vtengine_kernels.dispatch import select
from vtengine_kernels.paged_prefill import flash, flashinfer, ref, triton

Impl = Literal["auto", "flash", "triton", "ref", "flashinfer"]

_IMPLS: dict[str, ModuleType] = {"flash": flash, "triton": triton, "ref": ref, "flashinfer": flashinfer}

__all__ = ["Impl", "available", "paged_prefill"]


def available(keys: Tensor) -> bool:
    """Whether impl "auto" has something better than the reference for keys like these."""
    return select("paged_prefill", "auto", _IMPLS, keys) is not ref


def paged_prefill(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, offsets: Tensor, longest: int,
    *, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """q [T, Hq, D], keys and values [pages, page_size, Hkv, D] -> [T, Hq, D]. The scale is 1 / sqrt(D).

    tables int64 [N, P], lengths int64 [N], offsets int64 [N + 1] from 0 to T; longest: most queries of a row, on the
    host. Every row has at least one query and no more than its length; lengths fit the tables (not checked, nor are
    page numbers). What lies beyond a length may hold anything, NaN too.

    "flash", "flashinfer": CUDA, 16 bits, where these packages are installed; "auto" never takes FlashInfer (see
    `flashinfer_paged`). "triton": CUDA, 16-bit and float32, head sizes up to 128. "ref": all.
    ValueError: shapes or dtypes that do not fit. RuntimeError: `impl` is not available here.
    """
    _check(q, keys, values, tables, lengths, offsets)
    module = select("paged_prefill", impl, _IMPLS, keys)
    return module.paged_prefill(q, keys, values, tables, lengths, offsets, longest)


def _check(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, offsets: Tensor) -> None:
    if (
        q.ndim != 3
        or keys.ndim != 4
        or keys.shape != values.shape
        or keys.shape[3] != q.shape[2]
        or not keys.shape[2]
        or not keys.shape[3]
        or q.shape[1] % keys.shape[2]
    ):
        raise ValueError(
            f"paged_prefill: keys {list(keys.shape)}, values {list(values.shape)}: must be [pages, page_size, Hkv, D] "
            f"for q {list(q.shape)} [T, Hq, D], Hq a multiple of Hkv"
        )
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(f"paged_prefill: q {q.dtype}, keys {keys.dtype}, values {values.dtype}: must be equal")
    rows = len(lengths)
    shapes = tables.ndim == 2 and len(tables) == rows and lengths.shape == (rows,) and offsets.shape == (rows + 1,)
    if not shapes or {tables.dtype, lengths.dtype, offsets.dtype} != {torch.int64}:
        raise ValueError(
            f"paged_prefill: tables {list(tables.shape)} {tables.dtype}, lengths {list(lengths.shape)} "
            f"{lengths.dtype}, offsets {list(offsets.shape)} {offsets.dtype}: must be int64 [N, P], [N] and [N + 1]"
        )
    named = {"keys": keys, "values": values, "tables": tables, "lengths": lengths, "offsets": offsets}
    for name, tensor in named.items():
        if not tensor.is_contiguous() or tensor.device != q.device:
            raise ValueError(
                f"paged_prefill: {name} with strides {list(tensor.stride())} on {tensor.device}: must be "
                f"contiguous, on {q.device}"
            )
