"""How many requests are in the house: some run, some wait, the rest are refused at the door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from vtengine.server.config import ServerLimits
from vtengine.server.errors import BROKEN, OVERLOADED, ApiError


class Gate:
    """`enter` before anything of the body is read, `running` around the work. One event loop only."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.max_running)
        self.inside = 0
        self.running_now = 0
        self.held_bytes = 0
        self.draining = False

    @property
    def waiting(self) -> int:
        return self.inside - self.running_now

    @contextmanager
    def enter(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that accounts for bytes of the request held until the exit.

        Raises ApiError, as that function does: 429 when there is no room, 503 when the server is about to stop.
        """
        retry = self._limits.retry_after_s
        if self.draining:
            raise ApiError(503, "shutting_down", "the server is stopping", kind=BROKEN, retry_after_s=retry)
        room = self._limits.max_running + self._limits.max_waiting
        if self.inside >= room:
            message = f"{self.running_now} requests run and {self.waiting} wait; try again later"
            raise ApiError(429, "queue_full", message, kind=OVERLOADED, retry_after_s=retry)
        held = 0

        def hold(num_bytes: int) -> None:
            nonlocal held
            if self.held_bytes + num_bytes > self._limits.max_held_bytes:
                message = "the requests inside fill the memory set aside for them; try again later"
                raise ApiError(429, "queue_full", message, kind=OVERLOADED, retry_after_s=retry)
            held += num_bytes
            self.held_bytes += num_bytes

        self.inside += 1
        try:
            yield hold
        finally:
            self.inside -= 1
            self.held_bytes -= held

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Waits for a place, first come, first served."""
        async with self._slots:
            self.running_now += 1
            try:
                yield
            finally:
                self.running_now -= 1
