"""Calls that may never return, or that nobody waits for any more, beside an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")


def in_daemon(function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
    """As `asyncio.to_thread`, begun at once, in a thread that keeps neither the loop nor the process from ending.

    An event loop that ends waits for the threads of `to_thread`, also for those that nobody waits for any more. It has
    the GPU and the number of threads of its caller; torch would begin with the first GPU, and with the number that any
    thread has set last. A process that it outlives has to end by `os._exit` (`is_running`).
    """
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # the thread goes on when its result is given up
    num_threads = torch.get_num_threads()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work(function: Callable[..., T], arguments: tuple[object, ...], done: Future[T]) -> None:
        try:
            torch.set_num_threads(num_threads)
            if gpu is not None:
                torch.cuda.set_device(gpu)
            done.set_result(function(*arguments))
        except BaseException as error:
            done.set_exception(error)
        finally:  # an error knows this frame: one that knew the error too would keep all alive until a collection
            del function, arguments, done

    threading.Thread(target=work, args=(function, arguments, done), name=NAME, daemon=True).start()
    return asyncio.wrap_future(done)


NAME = "vtengine-daemon"


def is_running() -> bool:
    """Whether a thread of `in_daemon` is not done: an interpreter that ends while it is inside of torch aborts the
    process, whatever its status."""
    return any(thread.name == NAME for thread in threading.enumerate())
