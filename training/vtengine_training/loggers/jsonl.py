"""metrics.jsonl: the run's own record, a row per step. It is no logger that may fail: its OSError ends the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vtengine_training.files import write_whole
from vtengine_training.loggers.base import Row

NAME = "metrics.jsonl"
DIGITS = 7


class JsonLines:
    """Appends to output/metrics.jsonl. done: the step that a resumed run goes on from; rows past it are dropped."""

    def __init__(self, output: Path, done: int) -> None:
        path = output / NAME
        cut_metrics(path, done)
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: Row) -> None:
        self._file.write(json.dumps(rounded(row)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def cut_metrics(path: Path, done: int) -> None:
    """Keeps the rows up to step `done`: those after it, and a torn last line, belong to work that was lost. A run that
    begins anew (0) keeps none: the row of the model before its first step comes again.

    Raises OSError for a line that is no row of ours: somebody else's file is not written over.
    """
    if not path.is_file():
        return
    kept = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            is_kept = json.loads(line)["step"] <= done and done > 0
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise OSError(f"{path}: line {number} is no row of metrics ({error!r}); move the file away") from error
        if is_kept:
            kept.append(line + "\n")
    write_whole(path, "".join(kept))


def rounded(row: Row) -> dict[str, Any]:
    """For JSON: seven significant digits, whole numbers as such, and null for what is not finite."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if not isinstance(value, float):
            found[name] = rounded(value) if isinstance(value, dict) else value
        elif not math.isfinite(value):
            found[name] = None
        else:
            found[name] = int(value) if value.is_integer() else float(f"{value:.{DIGITS}g}")
    return found
