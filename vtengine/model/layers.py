"""Parts shared by the vision tower and the language model: norm, feed-forward, rotary embedding."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from vtengine_kernels import layer_ops

from vtengine.model.linear import Linear


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the mean square is taken in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_ops.rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix: gate's rows first."""

    def __init__(self, size: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_up = Linear(size, 2 * inner, bias=bias)
        self.down = Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(layer_ops.swiglu(self.gate_up(x)))


@functools.cache  # without end: CUDA graphs hold the addresses
@torch.inference_mode(False)
def inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """float32 [dim / 2]: theta ** (-2i / dim)."""
    # Always computed on the CPU: the rounding of pow differs between devices, and angles multiply it by the position.
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return (1.0 / theta**steps).to(device)


def rotary_tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """angles float32 [N, D/2] -> (cos, signed sin), each float32 [N, 1, D], as `layer_ops.rotary` takes them."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)
