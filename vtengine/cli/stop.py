"""The first signal to stop ends a run in good order; what was made until then is kept."""

from __future__ import annotations

import asyncio
import signal
import time

REPEATED_SIGNAL_S = 2.0  # wrappers and terminals may deliver one Ctrl-C twice


class Stop:
    """Cancels the current task at the first SIGINT or SIGTERM; one that comes long after it ends the process."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._first_s = 0.0
        self._task = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._catch, number)

    @property
    def status(self) -> int:
        """The exit status of a process that the signal ended."""
        return 128 + (self.number or 0)

    def _catch(self, number: int) -> None:
        if self.number is None:
            self.number, self._first_s = number, time.monotonic()
            assert self._task is not None
            self._task.cancel()
        elif time.monotonic() - self._first_s > REPEATED_SIGNAL_S:
            raise KeyboardInterrupt
