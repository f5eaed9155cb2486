"""Between the episodes of a stream and its connection: text gathers until it is worth an event of its own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from vtengine.rollout.episode import Asked, Episode, Event, TextDelta

Word = Event | Episode
Told = tuple[int, Word]
"""A choice's index and what it tells; its episode comes last."""


class Mailbox:
    """Ends and the first text of a turn are handed over at once; all else within `interval_s()` seconds, text so long
    after what was handed over before it: a backend that keeps this pace by itself never waits.

    Waking a task, encoding an event and a system call cost about as much as computing a token of a small model; a
    reader cannot tell text that comes ten times a second from text that comes a hundred times.
    """

    def __init__(self, interval_s: Callable[[], float], silence_s: float) -> None:
        """silence_s: the longest that `take` waits. Needs a running event loop; close it there."""
        self._loop = asyncio.get_running_loop()
        self._interval_s, self._silence_s = interval_s, silence_s
        self._told: list[Told] = []
        self._ready = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._taken_s = -math.inf
        self._alarm = self._loop.call_later(silence_s, self._mind_silence)
        self._begun: set[int] = set()  # choices whose turn has text already

    def put(self, told: Told) -> None:
        index, event = told
        if isinstance(event, TextDelta):
            if self._joined(index, event):
                return
            self._told.append(told)
            if index in self._begun:
                self._wake_after(self._taken_s)
            else:
                self._begun.add(index)
                self.wake()
            return
        self._told.append(told)
        if isinstance(event, Episode):
            self.wake()
            return
        if isinstance(event, Asked):
            self._begun.discard(index)
        self._wake_after(self._loop.time())  # what comes next takes it along

    def wake(self) -> None:
        self._ready.set()

    async def take(self) -> list[Told]:
        """What was put since the last time; nothing after a silence, or when it was only woken."""
        await self._ready.wait()
        self._taken_s = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._ready.clear()
        told, self._told = self._told, []
        return told

    def close(self) -> None:
        """Stops the clock."""
        self._alarm.cancel()
        if self._timer is not None:
            self._timer.cancel()

    def _joined(self, index: int, event: TextDelta) -> bool:
        """Text joins the text of the same choice before it."""
        if not self._told or self._told[-1][0] != index:
            return False
        last = self._told[-1][1]
        if not isinstance(last, TextDelta):
            return False
        self._told[-1] = (index, TextDelta(event.turn, last.text + event.text))
        return True

    def _wake_after(self, begin_s: float) -> None:
        """interval_s() after a time of the event loop's clock."""
        if self._timer is not None or self._ready.is_set():
            return
        wake_s = begin_s + self._interval_s()
        if wake_s <= self._loop.time():
            self.wake()
        else:
            self._timer = self._loop.call_at(wake_s, self.wake)

    def _mind_silence(self) -> None:
        """One timer that is wound up again costs less than one for every wait."""
        now_s = self._loop.time()
        if self._taken_s + self._silence_s <= now_s:
            self.wake()
            self._taken_s = now_s
        self._alarm = self._loop.call_at(self._taken_s + self._silence_s, self._mind_silence)
