"""layer_ops: what a transformer layer does between its matrix products: norm, gate, rotary embedding.

Suffixes: N rows, H numbers of a row, I half of them, D head size. A row's result depends on nothing but the row.
"torch": any device and dtype, differentiable. The others in inference mode. "cpu": float32 and bfloat16 on the CPU.
"triton": on CUDA. "flashinfer": `swiglu` in 16 bits on CUDA, and only by name (see `flashinfer_paged`).
ValueError: shapes or devices that do not fit, no such `impl`, or it does not take these tensors.
RuntimeError: `impl` is not available here.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

from torch import Tensor

from vtengine_kernels.dispatch import select
from vtengine_kernels.layer_ops import flashinfer, native, plain, triton

Impl = Literal["auto", "triton", "cpu", "torch", "flashinfer"]

_IMPLS: dict[str, ModuleType] = {"triton": triton, "cpu": native, "torch": plain}
_GATES = {**_IMPLS, "flashinfer": flashinfer}
_PADDED_GATES: dict[str, ModuleType] = {"triton": triton, "torch": plain}

__all__ = ["Impl", "add_rms_norm", "rms_norm", "rotary", "swiglu"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: Impl = "auto") -> Tensor:
    """x [N, H] / rms(x) * weight [H] -> [N, H]; the mean square is taken in float32."""
    if x.ndim != 2 or weight.shape != x.shape[1:] or weight.device != x.device:
        raise _misfit("rms_norm", "x [N, H], weight [H]", x, weight)
    out: Tensor = select("layer_ops", impl, _IMPLS, x).rms_norm(x, weight, eps)
    return out


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """x, y [N, H], of one dtype -> (x + y, rms_norm(x + y, weight, eps)), both [N, H]."""
    if x.ndim != 2 or y.shape != x.shape or weight.shape != x.shape[1:] or not x.device == y.device == weight.device:
        raise _misfit("add_rms_norm", "x, y [N, H], weight [H]", x, y, weight)
    if y.dtype != x.dtype:
        raise ValueError(f"add_rms_norm: x {x.dtype}, y {y.dtype}: must be equal")
    module = select("layer_ops", impl, _IMPLS, x)
    if module is triton:
        return triton.add_rms_norm(x, y, weight, eps)
    total = x + y
    return total, module.rms_norm(total, weight, eps)


def swiglu(x: Tensor, *, columns: int | None = None, impl: Impl = "auto") -> Tensor:
    """x [N, 2 I], the gate before what it gates -> silu(gate) * up [N, I].

    columns: at least I; the result has as many, zeros at the end. By "triton" or "torch", and without gradients.
    """
    if x.ndim != 2 or x.shape[1] % 2 or (columns is not None and columns < x.shape[1] // 2):
        raise _misfit("swiglu", "x [N, 2 I]" + ("" if columns is None else f", columns = {columns} >= I"), x)
    if columns is not None:
        padded: Tensor = select("layer_ops", impl, _PADDED_GATES, x).swiglu(x, columns)
        return padded
    out: Tensor = select("layer_ops", impl, _GATES, x).swiglu(x)
    return out


def rotary(x: Tensor, cos: Tensor, signed_sin: Tensor, *, impl: Impl = "auto") -> Tensor:
    """x [N, heads, D], tables float32 [N, 1, D] -> [N, heads, D]: pairs (i, i + D/2) are turned, in float32.

    signed_sin: the sine, negative in the first half of D. Rows and heads of x may be strided.
    """
    wanted = (len(x), 1, x.shape[-1]) if x.ndim == 3 and x.shape[2] % 2 == 0 else None
    if not cos.shape == signed_sin.shape == wanted or not x.device == cos.device == signed_sin.device:
        raise _misfit("rotary", "x [N, heads, D], D even, tables [N, 1, D] twice", x, cos, signed_sin)
    out: Tensor = select("layer_ops", impl, _IMPLS, x).rotary(x, cos, signed_sin)
    return out


def _misfit(op: str, wanted: str, *tensors: Tensor) -> ValueError:
    found = ", ".join(f"{list(x.shape)} on {x.device}" for x in tensors)
    return ValueError(f"{op}: {found}: must be {wanted}, on one device")
