"""The C++ implementation (csrc/cpu/prefix_attention.cpp): float32 and bfloat16 on the CPU, pages read in place."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from vtengine_kernels import library
from vtengine_kernels.prefix_attention.siblings import Siblings

HEAD_SIZES = (16, 32, 64, 80, 96, 128, 256)


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "tables", "lengths", "order", "shared", "out")),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "heads", "kv_heads", "size", "page_size", "q_stride", "table_stride")
        ),
        ("scale", ctypes.c_float),
        ("is_bfloat16", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    )


@functools.cache
def missing() -> str | None:
    """Why there is no such function here, or None."""
    return library.missing("vt_prefix_attention_shared")


def takes(keys: Tensor) -> bool:
    """Whether a cache of this kind is implemented."""
    return keys.device.type == "cpu" and keys.dtype in (torch.float32, torch.bfloat16) and keys.shape[3] in HEAD_SIZES


def prefix_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    siblings: Siblings | None = None,
    isa: str = "auto",
) -> Tensor:
    """Contract: the package's docstring. Threads: torch's. RuntimeError: this machine lacks `isa` (for tests)."""
    if q.stride()[1:] != (q.shape[2], 1):
        q = q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype)
    args = _Args(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        tables.data_ptr(),
        lengths.data_ptr(),
        None if siblings is None else siblings.order.data_ptr(),
        None if siblings is None else siblings.shared.data_ptr(),
        out.data_ptr(),
        q.shape[0],
        q.shape[1],
        keys.shape[2],
        q.shape[2],
        keys.shape[1],
        q.stride(0),
        tables.stride(0),
        scale,
        q.dtype == torch.bfloat16,
        library.ISAS[isa],
        torch.get_num_threads(),
    )
    status = library.load().vt_prefix_attention_shared(ctypes.byref(args))
    if status == 2:
        raise MemoryError("prefix_attention: out of memory")
    if status:
        raise RuntimeError(f"prefix_attention: the C++ implementation failed with status {status} (isa {isa})")
    return out
