"""Matrix products of the model. On AMD processors float32 products go to oneDNN instead of MKL.

MKL takes its AVX2 kernels there; oneDNN's AVX-512 ones were measured 1.7 to 2.3 times as fast (64 to 2,000 rows,
256 x 1,536 weights, one thread), forward and backward. Elsewhere, and for other devices and dtypes, torch's own choice.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# With fewer rows torch's matrix-vector products are faster.
MIN_ROWS = 4


class Linear(nn.Linear):
    """nn.Linear over rows: x [N, in] -> [N, out]."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [N, in] @ weight [out, in].T + bias [out] -> [N, out]; differentiable once."""
    if (
        len(x) < MIN_ROWS
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or not onednn_is_better()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _OneDNN.apply(x, weight, bias)
        return out
    return _product(x.contiguous(), weight, bias)


@functools.cache
def onednn_is_better() -> bool:
    """Whether this is an AMD processor with AVX-512, and the oneDNN operator is there and gives the right numbers."""
    try:
        if (
            "AuthenticAMD" not in Path("/proc/cpuinfo").read_text()
            or "AVX512" not in torch.backends.cpu.get_cpu_capability()
        ):
            return False
        with torch.inference_mode():
            x, weight, bias = torch.eye(8, 16), torch.arange(48.0).view(3, 16), torch.ones(3)
            return torch.equal(_product(x, weight, bias), F.linear(x, weight, bias))
    except (OSError, AttributeError, RuntimeError):
        return False


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t(), None) if to_x else None,
            _product(grad.t(), x.t(), None) if to_weight else None,
            grad.sum(0) if to_bias else None,
        )
