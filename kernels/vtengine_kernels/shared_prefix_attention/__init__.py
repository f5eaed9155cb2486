"""shared_prefix_attention: causal attention over packed sequences that share their beginnings, each beginning once.

The pack is a tree of segments, `[prefix | r_1 | ... | r_n]` for one group of siblings: a token attends to its own
segment up to itself and to every token of the segments above. Several groups and nested prefixes are one tree
(`tree.PrefixTree`). The result is that of plain causal attention over every path written out, gradients included.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from vtengine_kernels.dispatch import select
from vtengine_kernels.shared_prefix_attention import flash, ref, tiles
from vtengine_kernels.shared_prefix_attention.tree import PrefixTree

Impl = Literal["auto", "flash", "tiles", "ref"]

_IMPLS: dict[str, ModuleType] = {"flash": flash, "tiles": tiles, "ref": ref}

__all__ = ["Impl", "PrefixTree", "shared_prefix_attention"]


def shared_prefix_attention(q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, *, impl: Impl = "auto") -> Tensor:
    """q [T, Hq, D], k and v [T, Hkv, D], T = tree.num_tokens -> [T, Hq, D]; differentiable once.

    The scale is 1 / sqrt(D); query head h reads key head h * Hkv // Hq. Rows and heads may be strided views; the last
    dimension is contiguous. "flash": CUDA, float16 and bfloat16. "tiles": any device, in float32, or float64 where the
    inputs are. "ref": the definition, a dense mask over T x T.
    ValueError: shapes, dtypes or devices that do not fit. RuntimeError: `impl` is not available here.
    """
    _check(q, k, v, tree)
    module = select("shared_prefix_attention", impl, _IMPLS, q)
    if not len(q):
        return q + 0 * (k.sum() + v.sum())
    if module is ref:
        return ref.attend(q, k, v, tree)
    out: Tensor = _Attend.apply(q, k, v, tree, module)
    return out


class _Attend(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, module: ModuleType) -> Tensor:
        ctx.tree, ctx.module = tree, module
        out, kept = module.forward(q, k, v, tree)
        ctx.save_for_backward(q, k, v, *kept)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        return (*ctx.module.backward(grad, q, k, v, tuple(kept), ctx.tree), None, None)


def _check(q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree) -> None:
    shaped = q.ndim == 3 and k.ndim == 3 and k.shape == v.shape and q.shape[::2] == k.shape[::2]
    if not shaped or not k.shape[1] or not k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: must be [T, Hq, D], [T, Hkv, D], [T, Hkv, D], "
            "Hq a multiple of Hkv"
        )
    if len(q) != tree.num_tokens:
        raise ValueError(f"{len(q)} tokens, but the tree's segments hold {tree.num_tokens}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: must be equal, and floating-point")
    if not q.device == k.device == v.device:
        raise ValueError(f"q on {q.device}, k on {k.device}, v on {v.device}: must be on one device")
