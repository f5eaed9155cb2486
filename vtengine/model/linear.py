"""Matrix products of the model. On some AMD processors float32 products go to oneDNN instead of MKL; those of few
bfloat16 rows go to a kernel of our own.

Which and why: `vtengine_kernels.onednn`, `vtengine_kernels.few_rows`. Elsewhere, on other devices: torch's own choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from vtengine_kernels import few_rows
from vtengine_kernels.onednn import onednn_is_better, product

# With fewer rows torch's matrix-vector products are faster.
MIN_ROWS = 4


class Linear(nn.Linear):
    """nn.Linear over rows: x [N, in] -> [N, out]."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [N, in] @ weight [out, in].T + bias [out] -> [N, out]; differentiable once."""
    if few_rows.takes(x, weight):
        return few_rows.product(x, weight, bias)
    if (
        len(x) < MIN_ROWS
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or not onednn_is_better(weight)
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _OneDNN.apply(x, weight, bias)
        return out
    return product(x.contiguous(), weight, bias)


def linear_float32(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, in] @ weight [out, in].T -> float32 [N, out]; no gradients.

    16-bit products on CUDA keep float32 sums, as those of `token_logprob` do, and those of few rows on the CPU; of more
    rows torch rounds them to 16 bits.
    """
    if few_rows.takes(x, weight):
        return few_rows.product(x, weight, dtype=torch.float32)
    if x.is_cuda and x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return linear(x, weight).float()


def store_by_column(model: nn.Module) -> None:
    """Turns the memory of the float32 matrices on the CPU, so that MKL's products read them in the order it packs them.

    Values, shapes and names stay, and weights can be copied in and saved as before. For models that are only read: FSDP
    takes no such parameters. Where oneDNN does the products, nothing changes.
    """
    for module in model.modules():
        if isinstance(module, Linear) and not onednn_is_better(module.weight):
            weight = module.weight
            if weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous():
                weight.data = weight.data.t().contiguous().t()


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if to_x else None,
            product(grad.t(), x.t()) if to_weight else None,
            grad.sum(0) if to_bias else None,
        )
