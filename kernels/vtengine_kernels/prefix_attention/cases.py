"""Shapes that the tests and the benchmark run: usual, prime, smallest, grouped, empty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """lengths: tokens that each row sees. shared_pages: leading pages that all rows have in common."""

    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    size: int = 64
    page_size: int = 16
    shared_pages: int = 0

    def tensors(
        self, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(q, keys, values, tables, lengths) on the CPU; every slot that no row sees is NaN."""
        generator = torch.Generator().manual_seed(seed)
        rows = len(self.lengths)
        width = max((-(-length // self.page_size) for length in self.lengths), default=1)
        num_pages = self.shared_pages + rows * width + 3
        shape = (num_pages, self.page_size, self.kv_heads, self.size)
        keys, values = (torch.full(shape, float("nan")) for _ in range(2))
        tables = self.shared_pages + torch.randperm(num_pages - self.shared_pages, generator=generator)[: rows * width]
        tables = tables.view(rows, width)
        tables[:, : self.shared_pages] = torch.arange(min(self.shared_pages, width))
        for row, length in enumerate(self.lengths):
            token = torch.arange(length)
            pages, offsets = tables[row, token // self.page_size], token % self.page_size
            for cache in (keys, values):
                cache[pages, offsets] = torch.randn(length, self.kv_heads, self.size, generator=generator)
        q = torch.randn(rows, self.heads, self.size, generator=generator) * 2
        return q.to(dtype), keys.to(dtype), values.to(dtype), tables, torch.tensor(self.lengths, dtype=torch.int64)


CASES = {
    "usual": Case((200, 37, 64, 16, 1)),
    "prime": Case((7, 13, 31), heads=7, kv_heads=1, size=32, page_size=5),
    "one": Case((1,), heads=1, kv_heads=1, size=16, page_size=1),
    "7b": Case((130, 5), heads=28, kv_heads=4, size=128),
    "size 80": Case((33, 2), size=80),
    "size 96": Case((33, 2), size=96, heads=6),
    "size 256": Case((40,), size=256, heads=2),
    "siblings": Case((50, 50, 49, 33), shared_pages=2),
    "empty": Case(()),
}
