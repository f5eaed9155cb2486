"""Adapters on a model in pieces: what engines get are whole weights with the adapters in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from vtengine_training.lora.adapters import Adapters


class MergedParts:
    """`WeightsInParts` of adapters: one layer after another, with its adapter in it."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self._coming: Iterator[tuple[str, Tensor]] = iter(())

    def gather(self, number: int) -> list[Tensor]:
        if number == 0:
            self._coming = self.adapters.merged()
        return [next(self._coming)[1]]

    def named(self, gather: Callable[[int], list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for number, target in enumerate(self.adapters.targets):
            yield f"{target.name}.weight", gather(number)[0]
