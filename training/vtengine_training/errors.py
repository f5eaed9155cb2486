"""Errors that training raises by name, and how other people's are told. Imports nothing."""

from __future__ import annotations


class Refused(ValueError):
    """No example can be asked. All ranks find it out alike, and raise it."""


class Once:
    """Which faults are new and worth a line: each reason once, not for every example, sibling and epoch; of reasons
    that name their example, so many."""

    SHOWN = 5

    def __init__(self) -> None:
        self._told: set[str] = set()

    def is_new(self, reason: str, example: str) -> bool:
        is_new = self._told.isdisjoint((reason, example)) and len(self._told) < 2 * self.SHOWN
        if is_new:
            self._told |= {reason, example}
        return is_new


def first_line(error: BaseException) -> str:
    """torch's go on with a trace of its own."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
