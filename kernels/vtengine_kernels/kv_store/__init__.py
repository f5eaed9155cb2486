"""kv_store: the keys and values of a pass's tokens go to their places in the pages, both in one launch.

Token t goes to slot slots[t]: page slots[t] // page_size, place slots[t] % page_size. No two slots are equal.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from vtengine_kernels.dispatch import select
from vtengine_kernels.kv_store import plain, ref, triton

Impl = Literal["auto", "triton", "torch", "ref"]

_IMPLS: dict[str, ModuleType] = {"triton": triton, "torch": plain, "ref": ref}

__all__ = ["Impl", "kv_store"]


def kv_store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *, impl: Impl = "auto") -> None:
    """k, v [T, Hkv, D] into keys, values [pages, page_size, Hkv, D] (contiguous) at slots int64 [T], in place.

    Rows of k and v may be strided views of a larger tensor. Slots lie within the pages and differ (not checked).
    "triton": CUDA. "torch", "ref": any device. ValueError: shapes, dtypes or layouts that do not fit.
    RuntimeError: `impl` is not available here.
    """
    _check(k, v, keys, values, slots)
    select("kv_store", impl, _IMPLS, keys).kv_store(k, v, keys, values, slots)


def _check(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    if (
        k.ndim != 3
        or k.shape != v.shape
        or keys.ndim != 4
        or keys.shape != values.shape
        or keys.shape[2:] != k.shape[1:]
    ):
        raise ValueError(
            f"kv_store: k {list(k.shape)}, v {list(v.shape)}, keys {list(keys.shape)}, values {list(values.shape)}: "
            "must be [T, Hkv, D] twice and [pages, page_size, Hkv, D] twice"
        )
    if len({k.dtype, v.dtype, keys.dtype, values.dtype}) > 1:
        raise ValueError(f"kv_store: k {k.dtype}, v {v.dtype}, keys {keys.dtype}, values {values.dtype}: must be equal")
    if slots.shape != k.shape[:1] or slots.dtype != torch.int64:
        raise ValueError(f"kv_store: slots {list(slots.shape)} {slots.dtype}: must be int64 [{k.shape[0]}]")
    if len({x.device for x in (k, v, keys, values, slots)}) > 1:
        raise ValueError(f"kv_store: tensors on {k.device}, {keys.device} and {slots.device}: must be on one device")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("kv_store: keys and values must be contiguous: they are written in place")
