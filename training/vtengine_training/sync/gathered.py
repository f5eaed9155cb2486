"""Every process has a whole copy of weights that the learner holds in pieces; engines read it, or are sent it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vtengine.model import ModelConfig, Qwen2_5_VL, hf_tensors, load_tensors
from vtengine_training.sync.base import Publisher, Weights


@dataclass(frozen=True, eq=False)
class CopiedParameters:
    """A `Publisher`: writes the learner's weights into `model` where they are, then lets `onward` publish them.

    To be called while nothing is generated.
    """

    onward: Publisher
    model: Qwen2_5_VL
    weights: Weights

    async def release(self) -> None:
        await self.onward.release()

    async def publish(self, version: int) -> None:
        load_tensors(self.model, self.weights())
        await self.onward.publish(version)


def gathered_weights(config: ModelConfig, whole: Callable[[str], Tensor]) -> Weights:
    """whole(name): the whole tensor of the model's parameter `name`; asked once per parameter, in a fixed order.

    One parameter at a time is there; where it is sharded, `whole` is a collective operation.
    """
    with torch.device("meta"):
        twin = Qwen2_5_VL(config)
    names = {id(parameter): name for name, parameter in twin.named_parameters()}
    with torch.enable_grad():  # a view then knows its base
        views = hf_tensors(twin, of=lambda parameter: parameter)

    @torch.no_grad()
    def iterate() -> Iterator[tuple[str, Tensor]]:
        held, tensor = "", torch.empty(0)
        for name, view in views.items():
            base = names[id(view if view._base is None else view._base)]
            if base != held:
                held, tensor = base, whole(base).contiguous()
            yield name, tensor.as_strided(view.shape, view.stride(), view.storage_offset())

    return iterate
