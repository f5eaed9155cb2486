"""A training step's figures, added up over micro-batches, updates and ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from vtengine_training.trainer.ranks import Ranks

MAXIMA = ("mismatch/max",)
"""Of these the largest counts; the others are sums."""
WORK = ("tokens/packed", "patches/encoded")
"""Logged as sums; the others as means over tokens."""


def read(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars in one copy: a GPU is waited for once."""
    values = torch.stack([figure.detach().double() for figure in figures.values()]).tolist()
    return dict(zip(figures, values, strict=True))


class StepFigures:
    """`add` per micro-batch, `add_update` per update, `means` at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._norms: list[float] = []
        self._losses: list[float] = []
        self._num_skipped = 0

    def add(self, figures: Mapping[str, float]) -> None:
        """Sums over tokens and maxima by name; `tokens` and `mismatch/tokens` say over how many."""
        for name, value in figures.items():
            self._sums[name] = max(self._sums[name], value) if name in MAXIMA else self._sums[name] + value

    def add_update(self, loss: float, norm: float) -> None:
        """norm: of the gradient, not finite where the update was skipped."""
        if math.isfinite(norm):
            self._norms.append(norm)
            self._losses.append(loss)
        else:
            self._num_skipped += 1

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Per-token means over all ranks, sums of work, and means over the updates; named as in the log. A meeting."""
        everywhere = StepFigures()
        for part in ranks.gather(dict(self._sums)):
            everywhere.add(part)
        sums = everywhere._sums
        trained, compared = sums.pop("tokens", 0.0), sums.pop("mismatch/tokens", 0.0)
        found = {"tokens/trained": trained, "updates/skipped": float(self._num_skipped)}
        for name, value in sums.items():
            tokens = compared if name.startswith("mismatch/") else trained
            if name in WORK or (tokens and name in MAXIMA):
                found[name] = value
            elif tokens:
                found[name] = value / tokens
        if self._norms:
            found["grad_norm"] = sum(self._norms) / len(self._norms)
            found["grad_norm/max"] = max(self._norms)
            found["loss"] = sum(self._losses) / len(self._losses)
        return found
