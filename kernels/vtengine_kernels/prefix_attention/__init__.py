"""prefix_attention: each row is one query token over the cached keys and values of its own sequence.

Row n attends over tokens 0 .. lengths[n] - 1; token t lies in page tables[n, t // page_size] at t % page_size. Query
head h reads key head h * Hkv // Hq. Rows may share pages: siblings of a group read one prompt, and `Siblings` says
which rows these are, so that what they share is read once for all of them. With whom a row shares changes the time and
never a bit of its result, so a sample does not depend on what else is in the batch. "cpu": nor does it change a bit
whether siblings are given at all.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from vtengine_kernels.dispatch import select
from vtengine_kernels.prefix_attention import flash, flashinfer, native, ref, triton
from vtengine_kernels.prefix_attention.siblings import Crossover, Siblings

Impl = Literal["auto", "flash", "triton", "cpu", "ref", "flashinfer"]

_IMPLS: dict[str, ModuleType] = {"flash": flash, "triton": triton, "cpu": native, "ref": ref, "flashinfer": flashinfer}
_SHARING = {name: _IMPLS[name] for name in ("triton", "cpu", "ref")}

__all__ = ["Crossover", "Impl", "Siblings", "available", "capturable", "crossover", "prefix_attention"]


def available(keys: Tensor) -> bool:
    """Whether impl "auto" has something faster than the reference for keys like these."""
    return select("prefix_attention", "auto", _IMPLS, keys) is not ref


def crossover(keys: Tensor) -> Crossover | None:
    """From where on impl "auto" gains by knowing siblings, as measured; None: it was not, or it does not."""
    module = select("prefix_attention", "auto", _SHARING, keys)
    return Crossover.measured(next(name for name, known in _SHARING.items() if known is module))


def capturable(keys: Tensor) -> Impl | None:
    """The implementation for a CUDA graph with keys like these: one that reads nothing back; None: there is none."""
    names: tuple[Impl, ...] = ("flash", "triton")
    return next((n for n in names if keys.is_cuda and _IMPLS[n].missing() is None and _IMPLS[n].takes(keys)), None)


def prefix_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, siblings: Siblings | None = None,
    *, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """q [N, Hq, D], keys and values [pages, page_size, Hkv, D], tables int64 [N, P], lengths int64 [N] -> [N, Hq, D].

    The scale is 1 / sqrt(D). siblings: of these rows. Lengths are at least 1 and fit their tables (not checked, nor are
    page numbers). Keys, values, lengths and the rows of tables are contiguous; what lies beyond a length may hold
    anything, NaN too.

    "flash", "flashinfer": CUDA, 16 bits, where these packages are installed; they know no siblings, so "auto" takes
    another where there are some, and it never takes FlashInfer (see `flashinfer_paged`). "triton": CUDA, 16-bit and
    float32. "cpu": float32 and bfloat16 (scores, weights and sums in float32), head sizes 16, 32, 64, 80, 96, 128, 256.
    "ref": all.
    ValueError: shapes, dtypes, layouts or devices that do not fit. RuntimeError: `impl` is not available here.
    """
    _check(q, keys, values, tables, lengths)
    if siblings is not None and not len(siblings.order) == len(siblings.shared) == len(q):
        raise ValueError(f"siblings of {len(siblings.order)} rows: must be of the {len(q)} rows of q")
    scale = q.shape[2] ** -0.5
    module = select("prefix_attention", impl, _SHARING if impl == "auto" and siblings is not None else _IMPLS, keys)
    return module.prefix_attention(q, keys, values, tables, lengths, scale, siblings)


def _check(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> None:
    shaped = q.ndim == 3 and keys.ndim == 4 and keys.shape == values.shape and keys.shape[3] == q.shape[2]
    if not shaped or not keys.shape[2] or not keys.shape[3] or q.shape[1] % keys.shape[2]:
        raise ValueError(
            f"keys {list(keys.shape)}, values {list(values.shape)}: must be [pages, page_size, Hkv, D] for q "
            f"{list(q.shape)} [N, Hq, D], Hq a multiple of Hkv"
        )
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(f"q {q.dtype}, keys {keys.dtype}, values {values.dtype}: must be equal")
    rows = len(q)
    shaped = tables.ndim == 2 and len(tables) == rows and lengths.shape == (rows,)
    if not shaped or {tables.dtype, lengths.dtype} != {torch.int64}:
        raise ValueError(
            f"tables {list(tables.shape)} {tables.dtype}, lengths {list(lengths.shape)} {lengths.dtype}: must be "
            f"int64 [{rows}, P] and int64 [{rows}]"
        )
    named = {"keys": keys, "values": values, "tables": tables[:1], "lengths": lengths}
    for name, tensor in named.items():
        if not tensor.is_contiguous() or tensor.device != q.device:
            raise ValueError(
                f"{name} with strides {list(tensor.stride())} on {tensor.device}: must be contiguous, on {q.device}"
            )
