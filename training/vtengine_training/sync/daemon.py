"""Calls that may never return, beside an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_daemon(function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
    """As `asyncio.to_thread`, begun at once, in a thread that keeps neither the loop nor the process from ending.

    An event loop that ends waits for the threads of `to_thread`, also for those that nobody waits for any more.
    """
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # the thread goes on when its result is given up

    def work() -> None:
        try:
            done.set_result(function(*arguments))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name="vtengine-training", daemon=True).start()
    return asyncio.wrap_future(done)
