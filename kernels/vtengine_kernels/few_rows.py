"""bfloat16 products of few rows with a large matrix on the CPU (csrc/cpu/few_rows.cpp), which decoding consists of.

They take as long as the matrix needs from memory. torch's own read it at half of that speed, and round every sum to 16
bits.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from vtengine_kernels import library

MOST_ROWS = 24
"""From about so many rows on oneDNN is faster."""


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "outputs", "size", "x_stride", "weight_stride")),
        *((name, ctypes.c_int32) for name in ("out_is_float", "num_threads")),
    )


@functools.cache
def missing() -> str | None:
    """Why there are no such products here, or None."""
    reason = library.missing("vt_few_rows")
    if reason is None and not library.load().vt_few_rows_here():
        return "the processor has no AVX-512 BF16"
    return reason


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether they are faster for these; without gradients."""
    return (
        0 < len(x) <= MOST_ROWS
        and x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and weight.stride(1) == 1
        and torch.is_inference_mode_enabled()
        and missing() is None
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """bfloat16 x [N, in] @ weight [out, in].T + bias [out] -> [N, out] of dtype bfloat16 or float32; sums in float32.

    A row's result depends on nothing but the row. Rows of weight are contiguous. RuntimeError: not available here.
    """
    x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    rows, (outputs, size) = len(x), weight.shape
    out = torch.empty(rows, outputs, dtype=dtype)
    if not out.numel():
        return out
    arguments = _Arguments(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
        rows, outputs, size, x.stride(0), weight.stride(0), dtype == torch.float32, torch.get_num_threads(),
    )  # fmt: skip
    status = library.load().vt_few_rows(ctypes.byref(arguments))
    if status:
        raise RuntimeError(f"few_rows: the C++ implementation failed with status {status}: {missing()}")
    return out
