"""How many requests are in the house: some run, some wait, the rest are refused at the door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from vtengine.server.config import ServerLimits
from vtengine.server.errors import BROKEN, OVERLOADED, ApiError


class Gate:
    """`enter` before anything of the body is read. One event loop only.

    inside: requests; running_now and waiting: their episodes, of which a request with n > 1 has several.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self.limits = limits
        self.slots = asyncio.Semaphore(limits.max_running)
        self.inside = 0
        self.running_now = 0
        self.waiting = 0
        self.held_bytes = 0
        self.draining = False

    @contextmanager
    def enter(self) -> Iterator[Visit]:
        """Raises ApiError, as the visit's methods do: 429 when there is no room, 503 when the server is about to
        stop."""
        if self.draining:
            retry = self.limits.retry_after_s
            raise ApiError(503, "shutting_down", "the server is stopping", kind=BROKEN, retry_after_s=retry)
        visit = Visit(self)
        visit.expect(1)
        self.inside += 1
        try:
            yield visit
        finally:
            self.inside -= 1
            visit.end()


class Visit:
    """What one request takes of the house."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._held_bytes = 0
        self._waiting = 0

    def expect(self, episodes: int) -> None:
        """So many more episodes of this request are to come."""
        gate = self._gate
        room = gate.limits.max_running + gate.limits.max_waiting
        if gate.running_now + gate.waiting + episodes > room:
            raise self._full(f"{gate.running_now} episodes run and {gate.waiting} wait; try again later")
        self._waiting += episodes
        gate.waiting += episodes

    def hold(self, num_bytes: int) -> None:
        """Accounts for bytes of the request that are kept until its end."""
        gate = self._gate
        if gate.held_bytes + num_bytes > gate.limits.max_held_bytes:
            raise self._full("the requests inside fill the memory set aside for them; try again later")
        self._held_bytes += num_bytes
        gate.held_bytes += num_bytes

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Around one expected episode. Waits for a place, first come, first served."""
        gate = self._gate
        async with gate.slots:
            self._waiting -= 1
            gate.waiting -= 1
            gate.running_now += 1
            try:
                yield
            finally:
                gate.running_now -= 1

    def end(self) -> None:
        self._gate.held_bytes -= self._held_bytes
        self._gate.waiting -= self._waiting

    def _full(self, message: str) -> ApiError:
        return ApiError(429, "queue_full", message, kind=OVERLOADED, retry_after_s=self._gate.limits.retry_after_s)
