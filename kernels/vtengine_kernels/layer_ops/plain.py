"""The torch implementation: any device and dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def missing() -> str | None:
    return None


def takes(x: Tensor) -> bool:
    return True


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Contract: the package's docstring, as for the others."""
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(x: Tensor, columns: int | None = None) -> Tensor:
    gate, up = x.chunk(2, -1)
    if columns is None:
        return F.silu(gate) * up
    out = x.new_empty(len(x), columns)
    torch.mul(F.silu(gate), up, out=out[:, : gate.shape[1]])
    out[:, gate.shape[1] :] = 0
    return out


def rotary(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    # Rolling by half a head swaps the halves; the sign of the first half is in the table.
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin).to(x.dtype)
