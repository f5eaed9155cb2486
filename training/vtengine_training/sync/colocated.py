"""Trainer and engine share one set of parameters: after an update only the caches must go."""

from __future__ import annotations

from vtengine.engine.base import Backend


async def announce(backend: Backend, version: int) -> None:
    """Tells the engine that the parameters it reads have changed in place: no tensor is copied.

    An update without tensors: the engine waits until nothing runs, drops the radix tree and the visual features, and
    stamps `version` on what it samples from then on.
    """
    await backend.load_weights({}, version)
