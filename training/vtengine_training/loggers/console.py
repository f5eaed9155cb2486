"""A progress bar on a terminal, a line per row elsewhere; on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable

from vtengine_training.loggers.base import Row
from vtengine_training.progress import progress_bar


class Console:
    """note: what is said of a row; total, done: steps of the run, and of it so far."""

    def __init__(self, total: int, done: int, note: Callable[[Row], str]) -> None:
        self._total, self._note = total, note
        self._progress = progress_bar()
        self._progress.start()
        self._task = self._progress.add_task("", total=total, completed=done, note="")

    def log(self, row: Row) -> None:
        step, note = int(row["step"]), self._note(row)
        if self._progress.console.is_terminal:
            self._progress.update(self._task, completed=step, note=note)
        else:
            print(f"step {step}/{self._total}  {note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._progress.stop()
