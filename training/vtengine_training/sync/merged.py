"""Adapters on a model in pieces: what engines get are whole weights with the adapters in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vtengine.model import Qwen2_5_VL, load_tensors
from vtengine_training.sync.base import Publisher, Weights

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


@dataclass(frozen=True, eq=False)
class MergedCopy:
    """A `Publisher`: writes `weights`, which hold the adapters, into `model`, then lets `onward` publish it.

    To be called while nothing is generated. One tensor at a time is gathered: a meeting of all processes.
    """

    onward: Publisher
    model: Qwen2_5_VL
    weights: Weights

    async def release(self) -> None:
        await self.onward.release()

    async def publish(self, version: int) -> None:
        load_tensors(self.model, self.weights(), partial=True)
        await self.onward.publish(version)
