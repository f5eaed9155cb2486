"""How new weights reach the engine that generates: one call, whatever the engine is and wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from vtengine.model import VLModel, hf_tensors

Weights = Callable[[], Iterator[tuple[str, Tensor]]]
"""The learner's weights as they are now: (checkpoint name, whole tensor), one after the other, on any device."""


class WeightsInParts(Protocol):
    """Weights that lie in pieces on all ranks: made whole part by part, from 0 on. Every `gather` is a meeting."""

    def gather(self, number: int) -> list[Tensor]:
        """The number-th part."""
        ...

    def named(self, gather: Callable[[int], list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, whole tensor) of all. gather: called with 0, 1, ... once the next part is needed."""
        ...


class Publisher(Protocol):
    """What the trainer calls between two steps."""

    async def release(self) -> None:
        """Before the learner works: the engine gives back memory that it does not need until the next `publish`."""
        ...

    async def publish(self, version: int) -> None:
        """Returns once whatever is sampled from here on is sampled from the learner's weights as they are now.

        Completions then carry `version`, and nothing that was computed with older weights is used again. In a sharded
        learner every process calls it. Raises BackendFailed where the engine did not take them: the run cannot go on.
        """
        ...


def weights_of(model: VLModel, trained_only: bool = False) -> Weights:
    """Of a model that is whole in this process. trained_only: leaves out what requires no gradient, such as a frozen
    vision tower."""

    def iterate() -> Iterator[tuple[str, Tensor]]:
        with torch.enable_grad():  # views tell whether their parameter is trained
            views = hf_tensors(model, of=lambda parameter: parameter)
            chosen = {name: view for name, view in views.items() if view.requires_grad or not trained_only}
        for name, view in chosen.items():
            yield name, view.detach()

    return iterate
