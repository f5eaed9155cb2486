"""Every process has a whole copy of weights that the learner holds in pieces; its engine reads the copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vtengine.model import Qwen2_5_VL
from vtengine_training.sync.base import Publisher


@dataclass(frozen=True, eq=False)
class CopiedParameters:
    """A `Publisher`: writes what `learned` trains into `model`, which is the same model and whole, then lets `onward`
    publish it.

    To be called while nothing is generated. One parameter at a time is gathered: a meeting of all processes.
    """

    onward: Publisher
    model: Qwen2_5_VL
    learned: Qwen2_5_VL

    async def release(self) -> None:
        await self.onward.release()

    async def publish(self, version: int) -> None:
        with torch.no_grad():
            for name, parameter in self.learned.named_parameters():
                if parameter.requires_grad:
                    self.model.get_parameter(name).copy_(gathered(parameter, self.model.dtype))
        await self.onward.publish(version)


def gathered(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole of a parameter in `dtype`; a meeting where it is sharded."""
    tensor = parameter.detach().to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
