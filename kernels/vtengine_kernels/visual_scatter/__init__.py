"""visual_scatter: the features of distinct images go to every place that shows them; gradients are summed per feature.

An image is encoded once, however many sequences show it. The backward sum runs in a fixed order in float32, without
atomics: the same bits in every run.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from vtengine_kernels.visual_scatter import ref, triton
from vtengine_kernels.visual_scatter.placement import Placement

Impl = Literal["auto", "triton", "ref"]

_IMPLS: dict[str, ModuleType] = {"triton": triton, "ref": ref}

__all__ = ["Impl", "Placement", "visual_scatter"]


def visual_scatter(features: Tensor, placement: Placement, *, impl: Impl = "auto") -> Tensor:
    """features [V, H], placement of N places over V features -> [N, H]: row n is features[placement.rows[n]].

    Differentiable once; the gradient of a feature that is shown nowhere is 0. "triton": CUDA, or the interpreter.
    "ref": torch, any device.
    ValueError: sizes or devices that do not fit. RuntimeError: `impl` is not available here.
    """
    if features.ndim != 2 or len(features) != placement.num_features:
        raise ValueError(f"features {list(features.shape)}: must be [{placement.num_features}, H], as in the placement")
    if features.device != placement.rows.device:
        raise ValueError(f"features on {features.device}, placement on {placement.rows.device}: must be one device")
    chosen = _preferred(features) if impl == "auto" else impl
    if chosen not in _IMPLS:
        raise ValueError(f"visual_scatter: impl = {impl!r}: must be one of auto, {', '.join(_IMPLS)}")
    module = _IMPLS[chosen]
    if not module.takes(features):
        raise RuntimeError(f"visual_scatter: impl = {chosen!r} is not available: {module.missing() or 'CUDA only'}")
    out: Tensor = _Scatter.apply(features, placement, module)
    return out


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, placement: Placement, module: ModuleType) -> Tensor:
        ctx.placement, ctx.module = placement, module
        return features.index_select(0, placement.rows)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.module.segment_sum(grad.contiguous(), ctx.placement), None, None


def _preferred(features: Tensor) -> str:
    return next(name for name, module in _IMPLS.items() if module.takes(features))
