"""Packs that the tests and the benchmark run: usual, prime, smallest, nested, several groups, empty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtengine_kernels.shared_prefix_attention.tree import PrefixTree


@dataclass(frozen=True)
class Case:
    """lengths, parents: of the tree. heads, kv_heads, size: of the tensors."""

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    size: int = 64

    @property
    def tree(self) -> PrefixTree:
        return PrefixTree(self.lengths, self.parents)

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k, v) on the CPU: views of one fused tensor, as the model makes them."""
        generator = torch.Generator().manual_seed(seed)
        heads = self.heads + 2 * self.kv_heads
        fused = torch.randn(sum(self.lengths), heads, self.size, generator=generator).to(dtype)
        q, k, v = fused.split([self.heads, self.kv_heads, self.kv_heads], 1)
        return q, k, v


CASES = {
    "group": Case((40, 9, 30, 1, 17), (-1, 0, 0, 0, 0)),
    "two groups": Case((23, 7, 5, 11, 13, 2), (-1, 0, 0, -1, 3, 3), heads=6),
    "nested": Case((19, 8, 3, 5, 7, 6, 2, 150, 4), (-1, 0, 1, 2, 1, 0, 5, 0, -1)),
    "unrelated": Case((7, 13, 31), (-1, -1, -1)),
    "prime": Case((131, 67, 3, 211), (-1, 0, 0, 0), heads=7, kv_heads=1, size=32),
    "one": Case((1,), (-1,), heads=1, kv_heads=1, size=16),
    "ones": Case((1, 1, 1), (-1, 0, 1), heads=2, kv_heads=1),
    "7b": Case((70, 40, 25), (-1, 0, 0), heads=28, kv_heads=4, size=128),
    "long": Case((330, 150, 140), (-1, 0, 0), heads=16, size=32),
    "empty": Case((), ()),
}
