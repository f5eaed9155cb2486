"""Is a server that says nothing still there? A long generation is as silent as a frozen machine, so it is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

ASK_S = 20.0
"""Silence after which the server is asked."""

T = TypeVar("T")


class Patience:
    """Waits for one server. is_alive: asks it; limit_s: longest time without any sign of life.

    However many wait, they ask once every ASK_S, and what one of them hears counts for all.
    """

    def __init__(self, is_alive: Callable[[], Awaitable[bool]], limit_s: float) -> None:
        self._is_alive, self._limit_s = is_alive, limit_s
        self._ask_s = min(ASK_S, limit_s / 3)
        self._heard_s = 0.0
        self._question: asyncio.Task[None] | None = None

    async def wait_for(self, answer: Awaitable[T]) -> T:
        """Raises TimeoutError, and gives the answer up, when the server was silent for limit_s.

        Not before it was asked: it may be this process that stood still.
        """
        task, began_s = asyncio.ensure_future(answer), time.monotonic()
        task.add_done_callback(_is_seen)
        try:
            while not (await asyncio.wait({task}, timeout=self._ask_s))[0]:
                if time.monotonic() - self._heard_s >= self._ask_s:
                    grace_s = max(self._left_s(began_s), self._ask_s)
                    await asyncio.wait({task, self._asked()}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
                if not task.done() and self._left_s(began_s) <= 0:
                    raise TimeoutError
            self._heard_s = time.monotonic()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def close(self) -> None:
        """Takes back a question that is still open."""
        if self._question is not None:
            self._question.cancel()
            await asyncio.wait({self._question})

    def _left_s(self, began_s: float) -> float:
        return max(began_s, self._heard_s) + self._limit_s - time.monotonic()

    def _asked(self) -> asyncio.Task[None]:
        if self._question is None or self._question.done():
            self._question = asyncio.get_running_loop().create_task(self._ask())
        return self._question

    async def _ask(self) -> None:
        if await self._is_alive():
            self._heard_s = time.monotonic()


def _is_seen(task: asyncio.Future[T]) -> None:
    """The fault of an answer that nobody waits for any more is no news for asyncio's log."""
    if not task.cancelled():
        task.exception()
