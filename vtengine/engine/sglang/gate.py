"""Requests pass together; an update waits until they are out and keeps new ones waiting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """For one event loop."""

    def __init__(self) -> None:
        self.running = 0
        self._open, self._empty, self._one_update = asyncio.Event(), asyncio.Event(), asyncio.Lock()
        self._open.set()
        self._empty.set()

    async def enter(self) -> None:
        while not self._open.is_set():
            await self._open.wait()
        self.running += 1
        self._empty.clear()

    def leave(self) -> None:
        self.running -= 1
        if not self.running:
            self._empty.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Nobody is inside, nobody comes in. Updates queue up."""
        async with self._one_update:
            self._open.clear()
            try:
                await self._empty.wait()
                yield
            finally:
                self._open.set()
