"""Trainer and engine share one set of parameters: after an update only the caches must go."""

from __future__ import annotations

from dataclasses import dataclass

from vtengine.engine.base import Backend


@dataclass(frozen=True, eq=False)
class SharedParameters:
    """A `Publisher` for an engine that reads the learner's own parameters: no tensor is copied.

    An update without tensors: the engine waits until nothing runs, drops the radix tree and the visual features, and
    stamps `version` on what it samples from then on.
    """

    backend: Backend

    async def release(self) -> None:
        """Nothing: its pool of pages stays."""

    async def publish(self, version: int) -> None:
        await self.backend.load_weights({}, version)
