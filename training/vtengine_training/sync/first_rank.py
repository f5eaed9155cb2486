"""Several ranks that generate on the same servers: all of them gather the weights, the first one sends them."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from vtengine.engine.base import BackendFailed

if TYPE_CHECKING:
    from vtengine.engine.sglang import SglangBackend, SglangFleet
    from vtengine_training.sync.base import Publisher, WeightsInParts

GATHER, DONE, FAILED = "gather", "done", "failed"
"""What the first rank says: to what the others do next, or how it ended."""


class Meeting(Protocol):
    """What all ranks call together (`trainer.ranks.Ranks`)."""

    @property
    def is_first(self) -> bool: ...
    def first(self, value: Any = None) -> Any: ...
    def gather(self, value: Any) -> list[Any]: ...


@dataclass(eq=False)
class LedWeights:
    """`Weights` for the first rank's publisher: it says which part comes next, and all ranks gather it."""

    parts: WeightsInParts
    ranks: Meeting
    gathering: bool = field(default=False, init=False)

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        return self.parts.named(self._gather)

    @torch.no_grad()
    def _gather(self, number: int) -> list[Tensor]:
        self.gathering = True  # whoever fails in here cannot tell the others any more
        self.ranks.first([GATHER, number])
        whole = self.parts.gather(number)
        self.gathering = False
        return whole


@dataclass(frozen=True, eq=False)
class ByFirstRank:
    """A `Publisher`. sender: of `weights`, on the first rank; None on the others.

    The first rank says what comes before every meeting, so no rank waits for one that has failed: a fault of any of
    them is raised by all. Afterwards every rank asks the servers itself whether they have the new version.
    """

    ranks: Meeting
    backend: SglangBackend | SglangFleet
    weights: LedWeights
    sender: Publisher | None

    async def release(self) -> None:
        await self._together(None if self.sender is None else self.sender.release())

    async def publish(self, version: int) -> None:
        await self._together(None if self.sender is None else self.sender.publish(version))
        fault = ""
        if self.sender is None:
            try:
                await self.backend.adopt(version)
            except (BackendFailed, ValueError) as error:
                fault = _words(error)
        faults = [f"rank {rank}: {words}" for rank, words in enumerate(self.ranks.gather(fault)) if words]
        if faults:
            raise BackendFailed(f"version {version} of the weights: {'; '.join(faults)}")

    async def _together(self, work: Awaitable[None] | None) -> None:
        """work: the first rank's. It begins when every rank is here, that is, when none generates any more."""
        if work is None:
            async with self.backend.left_alone():
                self.ranks.gather(None)
                self._follow()
            return
        self.ranks.gather(None)
        try:
            await work
        except Exception as error:
            if not self.weights.gathering:
                self.ranks.first([FAILED, _words(error)])
            raise
        self.ranks.first([DONE, None])

    @torch.no_grad()
    def _follow(self) -> None:
        """Does what the first rank says. Nothing else of this process runs meanwhile: no server is asked anything."""
        while True:
            what, value = self.ranks.first()
            if what == FAILED:
                raise BackendFailed(f"the first rank could not go on: {value}")
            if what == DONE:
                return
            self.weights.parts.gather(value)


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, (BackendFailed, ValueError, OSError)) else f"{type(error).__name__}: {error}"
