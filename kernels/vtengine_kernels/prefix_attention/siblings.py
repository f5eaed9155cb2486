"""Which rows have their first pages in common, and whether that is worth the name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vtengine_kernels.prefix_attention import split


@dataclass(frozen=True)
class Siblings:
    """Rows in an order in which those that share pages stand together. Both int64 [N], on the CPU, contiguous.

    order: a permutation of the rows. shared: leading tokens of row order[n] that lie in the same pages as those of row
    order[n - 1]; shared[0] is 0. work: what `split.work` makes of them, on a GPU; None: it is made at every call.
    Rows with nothing in common are siblings too, if need be: `strangers`.
    """

    order: Tensor
    shared: Tensor
    work: Tensor | None = None

    @staticmethod
    @torch.inference_mode(False)
    def strangers(rows: int) -> Siblings:
        return Siblings(torch.arange(rows), torch.zeros(rows, dtype=torch.int64))

    def with_work(self, lengths: np.ndarray, device: torch.device) -> Siblings:
        """lengths: of the rows, on the host."""
        return replace(self, work=split.work(self, lengths, device))

    @staticmethod
    @torch.inference_mode(False)
    def of(tables: Sequence[Sequence[int]], page_size: int, crossover: Crossover) -> Siblings | None:
        """From the pages of each row; None where nothing is shared that is worth it."""
        order = sorted(range(len(tables)), key=lambda row: list(tables[row]))
        shared = [0] * len(order)
        for n in range(1, len(order)):
            shared[n] = page_size * _num_equal(tables[order[n - 1]], tables[order[n]])
        crossover.drop_small(shared)
        return Siblings(torch.tensor(order), torch.tensor(shared)) if any(shared) else None


@dataclass(frozen=True)
class Crossover:
    """From how many shared tokens on it pays to share: tokens[i] for siblings[i] rows or more (ascending)."""

    siblings: tuple[int, ...] = (2,)
    tokens: tuple[int, ...] = (1,)

    @staticmethod
    def measured(impl: str) -> Crossover | None:
        """What the benchmark suite found for an implementation; None: it was not measured, or never won."""
        found = _measured(impl)
        return Crossover(tuple(found["siblings"]), tuple(found["tokens"])) if found and found["siblings"] else None

    def fewest_tokens(self, rows: int) -> int | None:
        """For that many rows; None: these are too few."""
        known = [tokens for siblings, tokens in zip(self.siblings, self.tokens, strict=True) if siblings <= rows]
        return min(known, default=None)

    def drop_small(self, shared: list[int]) -> None:
        """Sets to 0, in place, what is shared by too few rows or is too short for them."""
        runs = [(0, len(shared))]
        while runs:
            begin, end = runs.pop()
            if end - begin < 2:
                continue
            weakest = min(range(begin + 1, end), key=shared.__getitem__)
            enough = self.fewest_tokens(end - begin)
            if enough is None or shared[weakest] < enough:
                shared[weakest] = 0
                runs += [(begin, weakest), (weakest, end)]


@cache
def _measured(impl: str) -> dict[str, list[int]] | None:
    path = Path(__file__).with_name(f"crossover_{impl}.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _num_equal(a: Sequence[int], b: Sequence[int]) -> int:
    """Leading elements that are equal, by bisection: comparing slices is fast, a loop over pages is not."""
    equal, beyond = 0, min(len(a), len(b)) + 1
    while beyond - equal > 1:
        middle = (equal + beyond) // 2
        if a[equal:middle] == b[equal:middle]:
            equal = middle
        else:
            beyond = middle
    return equal
