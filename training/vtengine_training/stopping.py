"""Asking a training run to stop: it finishes its step, saves, and ends with a status of its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

EXIT_STOPPED = 75
"""The step was finished and saved; the same command goes on from there (EX_TEMPFAIL of sysexits.h)."""
SAME_S = 1.0
"""A second SIGINT within so many seconds is the first one again: launchers pass on what their group has got already."""


class Stoppable(Protocol):
    """A run that looks at `stop_requested` after each step."""

    stop_requested: bool


@contextmanager
def stop_at_signal(run: Stoppable) -> Iterator[None]:
    """While inside, SIGTERM and Ctrl-C ask the run to stop after its step; one more Ctrl-C interrupts it at once."""
    interrupted_s: float | None = None

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted_s
        run.stop_requested = True
        if number != signal.SIGINT:
            return
        if interrupted_s is None:
            interrupted_s = time.monotonic()
            os.write(2, b"\nstopping after this step, and saving; Ctrl-C again: at once\n")
        elif time.monotonic() - interrupted_s > SAME_S:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
