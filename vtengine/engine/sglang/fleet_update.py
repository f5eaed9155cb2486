"""Updates of several servers as one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vtengine.engine.sglang.transport import ConnectionLost

if TYPE_CHECKING:
    from vtengine.engine.sglang.update import Bucket, Update


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
        await together(entering)

    async def leave(self, group: str) -> None:
        await together(update.leave(group) for update in self._updates)

    async def receive(self, bucket: Bucket, group: str) -> None:
        await together(update.receive(bucket, group) for update in self._updates)


async def together(work: Iterable[Awaitable[None]]) -> None:
    """All to their ends, then the first fault; a lost connection before what others then say."""
    found = await asyncio.gather(*work, return_exceptions=True)
    faults = [fault for fault in found if isinstance(fault, BaseException)]
    if faults:
        raise next((fault for fault in faults if isinstance(fault, ConnectionLost)), faults[0])
