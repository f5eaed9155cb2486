"""Weights that the learner holds in pieces on all ranks, made whole: every gathering is a meeting of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vtengine.model import VLModel, hf_views, load_tensors, meta_model
from vtengine_training.sync.base import Publisher, WeightsInParts


@dataclass(eq=False)
class CopiedWeights:
    """A `Publisher`: writes what was learned into `model`, which is whole, then lets `onward` publish it.

    To be called while nothing is generated. One part at a time is gathered. written: the version that `model` holds; a
    run begins with equal weights on both sides, version 0.
    """

    onward: Publisher
    model: VLModel
    parts: WeightsInParts
    written: int = 0

    async def release(self) -> None:
        await self.onward.release()

    async def publish(self, version: int) -> None:
        if version != self.written:
            load_tensors(self.model, self.parts.named(self.parts.gather), partial=True)
            self.written = version
        await self.onward.publish(version)


PART_BYTES = 512 << 20


class WeightParts:
    """`WeightsInParts`: what a sharded model trains, in `dtype`. A part has at most `part_bytes`, or one parameter."""

    def __init__(self, model: VLModel, dtype: torch.dtype, part_bytes: int | None = None) -> None:
        part_bytes = part_bytes or PART_BYTES
        self.model, self.dtype = model, dtype
        self._parts: list[list[nn.Parameter]] = []
        room = 0

        def of(parameter: nn.Parameter) -> Tensor:
            nonlocal room
            if parameter.requires_grad:
                size = parameter.numel() * dtype.itemsize
                if size > room:
                    self._parts.append([])
                    room = part_bytes
                self._parts[-1].append(parameter)
                room -= size
            return _shape_of(parameter)

        for _ in hf_views(model, of):
            pass

    def gather(self, number: int) -> list[Tensor]:
        return [gathered(parameter, self.dtype) for parameter in self._parts[number]]

    def named(self, gather: Callable[[int], list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
        whole: dict[int, Tensor] = {}
        coming = iter(range(len(self._parts)))

        def of(parameter: nn.Parameter) -> Tensor:
            if not parameter.requires_grad:
                return _shape_of(parameter)
            if id(parameter) not in whole:
                number = next(coming)
                whole.update(zip(map(id, self._parts[number]), gather(number), strict=True))
            return whole.pop(id(parameter))

        for name, tensor in hf_views(self.model, of):
            if not tensor.is_meta:
                yield name, tensor


def whole_copy(model: VLModel, dtype: torch.dtype, keep: bool) -> VLModel | None:
    """A sharded model in one piece in the memory of the CPU, on the ranks that `keep` it. A meeting."""
    copy = None
    if keep:
        copy = meta_model(model.config)
        copy.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = gathered(parameter, dtype)
            if copy is not None:
                copy.get_parameter(name).copy_(tensor)
    return copy


def gathered(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole of a parameter in `dtype`; a meeting where it is sharded."""
    tensor = parameter.detach().to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shape_of(parameter: nn.Parameter) -> Tensor:
    return torch.empty(parameter.shape, device="meta")
