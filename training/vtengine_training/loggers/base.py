"""What a logger is; and the one that keeps a failing logger from ending the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Protocol

log = logging.getLogger(__name__)
Row = Mapping[str, Any]
"""Metrics of a step, by name, `step` among them; a value may be a mapping of more of them."""


class Logger(Protocol):
    def log(self, row: Row) -> None: ...

    def close(self) -> None: ...


class Guarded:
    """A logger whose failures are said once and counted: metrics may be lost, the run is not."""

    def __init__(self, name: str, logger: Logger) -> None:
        self.name, self.logger = name, logger
        self.num_failed = 0

    def log(self, row: Row) -> None:
        try:
            self.logger.log(row)
        except Exception as error:
            self._failed(error)

    def close(self) -> None:
        try:
            self.logger.close()
        except Exception as error:
            self._failed(error)
        if self.num_failed > 1:
            log.warning("logger %s: failed %d times; metrics.jsonl has all rows", self.name, self.num_failed)

    def _failed(self, error: Exception) -> None:
        if not self.num_failed:
            log.warning("logger %s failed, and the run goes on without it: %r", self.name, error)
        self.num_failed += 1


def numbers(row: Row) -> dict[str, float]:
    """The finite numbers of a row; those of an inner mapping as outer/inner."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[name] = float(value)
    return found
