"""How far a command is: bars on a terminal, elsewhere a line now and then. On standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from vtengine.cli.progress import LINE_SECONDS


class Progress:
    """totals: how many there are to do, by name, in the order in which they are done; a single one needs no name."""

    def __init__(self, totals: Mapping[str, int], clock: Callable[[], float] = time.monotonic) -> None:
        self._totals, self._clock, self._said_s = totals, clock, clock()
        self._bars = progress_bar()
        self._tasks = {name: self._bars.add_task(name, total=total, note="") for name, total in totals.items()}

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def update(self, name: str, done: int, note: str = "") -> None:
        """done: so far, of `totals[name]`."""
        self._bars.update(self._tasks[name], completed=done, note=note)
        now = self._clock()
        if self._bars.console.is_terminal or (now - self._said_s < LINE_SECONDS and done < self._totals[name]):
            return
        self._said_s = now
        words = (name, f"{done}/{self._totals[name]}", note)
        print("  ".join(word for word in words if word), file=sys.stderr, flush=True)


def progress_bar() -> Any:
    """A progress line on standard error, where that is a terminal; elsewhere nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal)
