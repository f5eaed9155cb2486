"""The reference: one softmax under a dense mask, differentiated by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.shared_prefix_attention.tree import PrefixTree


def missing() -> str | None:
    return None


def takes(q: Tensor) -> bool:
    return True


def attend(q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree) -> Tensor:
    """Contract: the package's docstring. Works in the dtype of q."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q * q.shape[2] ** -0.5, k)
    weights = scores.masked_fill(~visible(tree).to(q.device), float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def visible(tree: PrefixTree) -> Tensor:
    """bool [T, T]: which key each query sees."""
    mask = torch.ones(tree.num_tokens, tree.num_tokens, dtype=torch.bool).tril_()
    seen = torch.zeros_like(mask)
    for segment, above in enumerate(tree.ancestors):
        rows = slice(tree.offsets[segment], tree.offsets[segment + 1])
        for own in (*above, segment):
            seen[rows, tree.offsets[own] : tree.offsets[own + 1]] = True
    return mask & seen
