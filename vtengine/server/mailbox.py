"""Between the episodes of a stream and its connection: text gathers until it is worth an event of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vtengine.rollout.episode import Asked, Episode, Event, Replied, TextDelta

Word = Event | Episode
Told = tuple[int, Word]
"""A choice's index and what it tells; its episode comes last."""


class Mailbox:
    """Turns, ends and the first text of a turn are handed over at once, other text within `interval_s()` seconds.

    Waking a task, encoding an event and a system call cost about as much as computing a token of a small model; a
    reader cannot tell text that comes ten times a second from text that comes a hundred times.
    """

    def __init__(self, interval_s: Callable[[], float]) -> None:
        self._interval_s = interval_s
        self._told: list[Told] = []
        self._ready = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._begun: set[int] = set()  # choices whose turn has text already

    def put(self, told: Told) -> None:
        index, event = told
        if isinstance(event, TextDelta):
            if self._joined(index, event):
                return
            self._told.append(told)
            if index in self._begun:
                self._soon()
            else:
                self._begun.add(index)
                self.wake()
            return
        self._told.append(told)
        if isinstance(event, Replied):  # what follows from it comes next, and takes it along
            self._soon()
            return
        if isinstance(event, Asked):
            self._begun.discard(index)
        self.wake()

    def wake(self) -> None:
        self._ready.set()

    async def take(self, timeout_s: float) -> list[Told]:
        """What was put since the last time; nothing after a silence of timeout_s, or when it was only woken."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            pass
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._ready.clear()
        told, self._told = self._told, []
        return told

    def _joined(self, index: int, event: TextDelta) -> bool:
        """Text joins the text of the same choice before it."""
        if not self._told or self._told[-1][0] != index:
            return False
        last = self._told[-1][1]
        if not isinstance(last, TextDelta):
            return False
        self._told[-1] = (index, TextDelta(event.turn, last.text + event.text))
        return True

    def _soon(self) -> None:
        if self._timer is None and not self._ready.is_set():
            self._timer = asyncio.get_running_loop().call_later(self._interval_s(), self.wake)
