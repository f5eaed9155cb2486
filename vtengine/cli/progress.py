"""Progress of a run on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta

LINE_SECONDS = 10.0


class Progress:
    """`advance` is called once per row written. `total` counts rows; `done` were there before this run."""

    def __init__(self, total: int, done: int, *, quiet: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._done = done
        self._clock = clock
        self._started_s = self._said_s = clock()
        self._fresh = self._upscaled = self._bad = 0
        self._quiet = quiet
        self._bar = _make_bar(total, done) if not quiet and sys.stderr.isatty() else None

    def advance(self, status: str, upscaled: bool) -> None:
        self._done += 1
        self._fresh += 1
        self._upscaled += upscaled
        self._bad += status in ("rejected", "failed")
        if self._bar is not None:
            self._bar.advance(self._note())
        elif not self._quiet and self._clock() - self._said_s >= LINE_SECONDS:
            self._said_s = self._clock()
            print(self._line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _note(self) -> str:
        return f"{self._upscaled} upscaled" + (f", {self._bad} rejected or failed" if self._bad else "")

    def _line(self) -> str:
        rate = self._fresh / max(1e-9, self._clock() - self._started_s)
        left = f", about {timedelta(seconds=round((self._total - self._done) / rate))} left" if rate else ""
        return f"{self._done}/{self._total} rows, {rate:.1f} rows/s, {self._note()}{left}"


class _Bar:
    """A rich progress bar with one task."""

    def __init__(self, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=total, completed=done)
        self._progress.start()

    def advance(self, note: str) -> None:
        self._progress.update(self._task, advance=1, description=note)

    def close(self) -> None:
        self._progress.stop()


def _make_bar(total: int, done: int) -> _Bar:
    return _Bar(total, done)
