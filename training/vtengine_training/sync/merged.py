"""Every process has a whole copy of a model whose adapters are learned; its engine reads the copy."""

from __future__ import annotations

from dataclasses import dataclass

from vtengine.model import Qwen2_5_VL, load_tensors
from vtengine_training.sync.base import Publisher, Weights


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
