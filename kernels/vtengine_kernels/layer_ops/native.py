"""The C++ implementation (csrc/cpu/layer_ops.cpp): float32 or bfloat16 on the CPU, one pass over the rows; no
gradients. bfloat16 is computed in float32 and rounded once."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from vtengine_kernels import library


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "x_stride")),
        *((name, ctypes.c_int32) for name in ("is_bfloat16", "isa", "num_threads")),
    )


_DTYPES = (torch.float32, torch.bfloat16)
_ARGUMENTS = {
    "vt_rms_norm": (ctypes.c_int64, ctypes.c_void_p, ctypes.c_float),
    "vt_swiglu": (ctypes.c_int64,),
    "vt_rotary": (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p),
}


@functools.cache
def missing() -> str | None:
    """Why there are no such functions here, or None."""
    return next((reason for name in _ARGUMENTS if (reason := library.missing(name)) is not None), None)


def takes(x: Tensor) -> bool:
    """Whether tensors of this kind are implemented, and nobody will ask for gradients."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and torch.is_inference_mode_enabled()


def rms_norm(x: Tensor, weight: Tensor, eps: float, isa: str = "auto") -> Tensor:
    """Contract: the package's docstring, as for the others. RuntimeError: this machine lacks `isa` (for tests)."""
    out = torch.empty(x.shape, dtype=x.dtype)
    weight = weight.float().contiguous()
    _call("vt_rms_norm", x, out, isa, x.shape[1], weight.data_ptr(), eps)
    return out


def swiglu(x: Tensor, isa: str = "auto") -> Tensor:
    size = x.shape[1] // 2
    out = torch.empty(len(x), size, dtype=x.dtype)
    _call("vt_swiglu", x, out, isa, size)
    return out


def rotary(x: Tensor, cos: Tensor, signed_sin: Tensor, isa: str = "auto") -> Tensor:
    _, heads, size = x.shape
    if x.stride(1) != size:
        x = x.contiguous()
    cos, signed_sin = cos.float().contiguous(), signed_sin.float().contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    _call("vt_rotary", x, out, isa, heads, size, cos.data_ptr(), signed_sin.data_ptr())
    return out


def _call(name: str, x: Tensor, out: Tensor, isa: str, *arguments: float) -> None:
    if not out.numel():
        return
    if x.stride(-1) != 1:
        x = x.contiguous()
    kind = (x.dtype == torch.bfloat16, library.ISAS[isa], torch.get_num_threads())
    rows = _Rows(x.data_ptr(), out.data_ptr(), len(x), x.stride(0), *kind)
    status = _function(name)(ctypes.byref(rows), *arguments)
    if status:
        raise RuntimeError(f"{name[3:]}: the C++ implementation failed with status {status} (isa {isa})")


@functools.cache
def _function(name: str) -> ctypes._NamedFuncPointer:
    function = getattr(library.load(), name)
    function.argtypes = (ctypes.c_void_p, *_ARGUMENTS[name])
    return function
