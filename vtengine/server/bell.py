"""When the one who writes a stream is woken: at once, soon, or after a silence."""

from __future__ import annotations

import asyncio

SOON_S = 0.25


class Bell:
    """One waits for it. What `ring_soon` tells of can wait so long for something that it goes out with."""

    def __init__(self, silence_s: float) -> None:
        """silence_s: the longest that `wait` waits. Needs a running event loop; close it there."""
        self._loop = asyncio.get_running_loop()
        self._is_rung = self._is_heard = False
        self._waiter: asyncio.Future[None] | None = None
        self._soon: asyncio.TimerHandle | None = None
        self._silence_s = silence_s
        self._heard_s = self._loop.time()
        self._alarm = self._loop.call_later(silence_s, self._mind_silence)

    def ring(self) -> None:
        """Heard once the loop has done what is ready now: the end of a reply then goes out with its last text."""
        if not self._is_rung:
            self._is_rung = True
            self._loop.call_soon(self._wake)

    def ring_soon(self) -> None:
        if self._soon is None and not self._is_rung:
            self._soon = self._loop.call_later(SOON_S, self.ring)

    async def wait(self) -> None:
        """Until it has rung since the last time."""
        if not self._is_heard:
            self._waiter = self._loop.create_future()
            await self._waiter
        self._is_rung = self._is_heard = False
        self._heard_s = self._loop.time()
        self._calm()

    def close(self) -> None:
        """Stops the clocks."""
        self._alarm.cancel()
        self._calm()

    def _wake(self) -> None:
        self._is_heard = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _calm(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None

    def _mind_silence(self) -> None:
        """One timer that is wound up again costs less than one for every wait."""
        now_s = self._loop.time()
        if self._heard_s + self._silence_s <= now_s:
            self.ring()
            self._heard_s = now_s
        self._alarm = self._loop.call_at(self._heard_s + self._silence_s, self._mind_silence)
