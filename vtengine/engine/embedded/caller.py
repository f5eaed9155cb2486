"""Who waits for a request: what the worker thread has for it goes to its event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from vtengine.engine.waiting import set_error, set_result, tell

if TYPE_CHECKING:
    from vtengine.engine.base import Completion, OnTokens
    from vtengine.engine.pace import Pace


class Outbox:
    """Calls that a step has for event loops. Each loop is woken once for all of them."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """The call must not raise."""
        self._calls.setdefault(loop, []).append(call)

    def deliver(self) -> None:
        calls, self._calls = self._calls, {}
        for loop, its in calls.items():
            # A closed loop raises RuntimeError: nobody waits there any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_call_all, its)


class Caller:
    """Made in the event loop of who calls, which waits for `completion`; the rest happens in the worker thread."""

    def __init__(self, outbox: Outbox, pace: Pace, on_tokens: OnTokens | None) -> None:
        self._loop = asyncio.get_running_loop()
        self.completion: asyncio.Future[Completion] = self._loop.create_future()
        self._outbox, self._pace, self._on_tokens = outbox, pace, on_tokens
        self._kept: list[int] = []
        self._begun = False

    def sampled(self, token_id: int) -> None:
        if self._on_tokens is None:
            return
        self._kept.append(token_id)
        if self._pace.is_due or not self._begun:
            self._hand_over(self._on_tokens)

    def finished(self, completion: Completion) -> None:
        if self._on_tokens is not None and self._kept:
            self._hand_over(self._on_tokens)
        self._outbox.add(self._loop, partial(set_result, self.completion, completion))

    def failed(self, error: Exception) -> None:
        self._outbox.add(self._loop, partial(set_error, self.completion, error))

    def _hand_over(self, on_tokens: OnTokens) -> None:
        self._begun = True
        self._outbox.add(self._loop, partial(tell, self.completion, on_tokens, self._kept))
        self._kept = []


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
