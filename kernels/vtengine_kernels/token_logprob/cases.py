"""Shapes and heads that the tests of token_logprob and grpo_loss run: usual, prime, smallest, empty, capped, banned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtengine_kernels.token_logprob.head import Head, LowRank


@dataclass(frozen=True)
class Case:
    """rank: of a low-rank term, 0 = none. num_banned: ids from the end of the vocabulary."""

    rows: int
    size: int
    vocabulary: int
    temperature: float = 1.0
    soft_cap: float | None = None
    num_banned: int = 0
    rank: int = 0

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Head, Tensor]:
        """(hidden, head, targets) on the CPU, the same numbers in every dtype but for rounding to bfloat16's grid, so
        that bfloat16 and float32 results are of the same inputs. No target is banned."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        hidden, weight = normal(self.rows, self.size), 2 * normal(self.vocabulary, self.size) / self.size**0.5
        allowed = self.vocabulary - self.num_banned
        targets = torch.randint(allowed, (self.rows,), generator=generator)
        low_rank = None
        if self.rank:
            factors = (normal(self.rank, self.size), normal(self.vocabulary, self.rank))
            a, b = (_on_grid(0.2 * factor, dtype) for factor in factors)
            low_rank = LowRank(a, b, scale=0.5)
        banned = torch.arange(allowed, self.vocabulary) if self.num_banned else None
        head = Head(_on_grid(weight, dtype), self.temperature, self.soft_cap, banned, low_rank)
        return _on_grid(hidden, dtype), head, targets


def _on_grid(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.bfloat16().to(dtype)


CASES = {
    "usual": Case(64, 96, 1024),
    "prime": Case(37, 61, 1013, temperature=0.7),
    "many blocks": Case(7, 13, 9001),
    "one": Case(1, 1, 1),
    "two ids": Case(5, 3, 2),
    "empty": Case(0, 8, 16),
    "banned": Case(23, 40, 576, num_banned=7),
    "capped": Case(23, 40, 509, soft_cap=5.0, temperature=1.3, num_banned=3),
    "low rank": Case(23, 40, 509, rank=4),
    "all": Case(41, 32, 1021, temperature=0.8, soft_cap=8.0, num_banned=2, rank=3),
}
