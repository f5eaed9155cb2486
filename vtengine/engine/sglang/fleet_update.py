"""Updates of several servers as one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vtengine.engine.sglang.transport import ConnectionLost

if TYPE_CHECKING:
    from vtengine.engine.sglang.update import Bucket, Update

GRACE_S = 60.0
"""How long the others may take to see that one of a process group is lost."""


class FleetUpdate:
    """Updates of several servers as one. ranks: of all their processes."""

    def __init__(self, updates: Sequence[Update]) -> None:
        self._updates = tuple(updates)
        self.ranks = sum(update.ranks for update in updates)

    def check(self, bucket: Bucket) -> None:
        for update in self._updates:
            update.check(bucket)

    async def disk(self, folder: Path) -> None:
        await together(update.disk(folder) for update in self._updates)

    async def tensors(self, bucket: Bucket) -> None:
        await together(update.tensors(bucket) for update in self._updates)

    async def join(self, group: str, address: str, port: int, backend: str) -> None:
        """Rank 0 is the trainer; the servers' processes follow in their order."""
        entering, first = [], 1
        for update in self._updates:
            entering.append(update.join_as(group, address, port, backend, first, self.ranks + 1))
            first += update.ranks
        await together(entering, GRACE_S)

    async def leave(self, group: str) -> None:
        await together((update.leave(group) for update in self._updates), GRACE_S)

    async def receive(self, bucket: Bucket, group: str) -> None:
        await together((update.receive(bucket, group) for update in self._updates), GRACE_S)


async def together(work: Iterable[Awaitable[object]], grace_s: float | None = None) -> None:
    """All to their ends, then the first fault; but if a connection was lost, ConnectionLost with the words of all.

    grace_s: after a fault the others have so long, and are then given up: they may wait for the one that is lost.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if waiting:
            await asyncio.wait(waiting, timeout=grace_s)
    finally:
        for task in tasks:
            task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    faults = [fault for fault in found if isinstance(fault, Exception)]  # not those that were cancelled
    if any(isinstance(fault, ConnectionLost) for fault in faults):
        faults.sort(key=lambda fault: not isinstance(fault, ConnectionLost))
        raise ConnectionLost("; ".join(dict.fromkeys(map(str, faults)))) from faults[0]
    if faults:
        raise faults[0]
