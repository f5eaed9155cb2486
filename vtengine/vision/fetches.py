"""Jobs that wait for hosts of a network: a silent host holds up its own images, and nobody once it is not wanted."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable

PER_HOST = 8
MOST = 128
"""Fetches at a time, from one host and from all."""


class Fetches:
    """Each job has a daemon thread of its own: a process that ends waits for none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[Callable[[], None]]] = {}

    def submit(self, host: str, job: Callable[[], None]) -> None:
        """Runs the job once there is room. It must not raise."""
        with self._lock:
            self._waiting.setdefault(host, deque()).append(job)
            self._start()

    def _start(self) -> None:
        """What there is room for; hosts take turns."""
        while self._running.total() < MOST:
            host = next((host for host in self._waiting if self._running[host] < PER_HOST), None)
            if host is None:
                return
            jobs = self._waiting.pop(host)
            self._running[host] += 1
            threading.Thread(target=self._run, args=(host, jobs.popleft()), name="fetch", daemon=True).start()
            if jobs:
                self._waiting[host] = jobs

    def _run(self, host: str, job: Callable[[], None]) -> None:
        try:
            job()
        finally:
            with self._lock:
                self._running[host] -= 1
                self._running += Counter()  # drops what is at 0
                self._start()
