"""prefix_attention: each row is one query token over the cached keys and values of its own sequence.

Row n attends over tokens 0 .. lengths[n] - 1; token t lies in page tables[n, t // page_size] at t % page_size. Query
head h reads key head h * Hkv // Hq. Rows may share pages: siblings of a group read one prompt.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from vtengine_kernels.dispatch import select
from vtengine_kernels.prefix_attention import native, ref, triton

Impl = Literal["auto", "triton", "cpu", "ref"]

_IMPLS: dict[str, ModuleType] = {"triton": triton, "cpu": native, "ref": ref}

__all__ = ["Impl", "available", "prefix_attention"]


def available(keys: Tensor) -> bool:
    """Whether impl "auto" has something faster than the reference for keys like these."""
    return select("prefix_attention", "auto", _IMPLS, keys) is not ref


def prefix_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """q [N, Hq, D], keys and values [pages, page_size, Hkv, D], tables int64 [N, P], lengths int64 [N] -> [N, Hq, D].

    The scale is 1 / sqrt(D). Lengths are at least 1 and fit their tables (not checked, nor are page numbers). Keys,
    values and tables are contiguous in all but the first dimension; what lies beyond a length may hold anything, NaN
    too. "triton": CUDA, 16-bit and float32. "cpu": float32, head sizes 16, 32, 64, 80, 96, 128, 256. "ref": all.
    ValueError: shapes or dtypes that do not fit. RuntimeError: `impl` is not available here.
    """
    _check(q, keys, values, tables, lengths)
    scale = q.shape[2] ** -0.5
    module = select("prefix_attention", impl, _IMPLS, keys)
    return module.prefix_attention(q, keys, values, tables, lengths, scale)


def _check(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> None:
    rows, heads, size = q.shape
    if keys.shape != values.shape or keys.ndim != 4 or keys.shape[3] != size or heads % keys.shape[2]:
        raise ValueError(
            f"keys {list(keys.shape)}, values {list(values.shape)}: must be [pages, page_size, Hkv, D] for q "
            f"{list(q.shape)} [N, Hq, D], Hq a multiple of Hkv"
        )
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(f"q {q.dtype}, keys {keys.dtype}, values {values.dtype}: must be equal")
    if tables.shape[0] != rows or lengths.shape != (rows,) or {tables.dtype, lengths.dtype} != {torch.int64}:
        raise ValueError(
            f"tables {list(tables.shape)} {tables.dtype}, lengths {list(lengths.shape)} {lengths.dtype}: must be "
            f"int64 [{rows}, P] and int64 [{rows}]"
        )
