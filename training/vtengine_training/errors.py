"""Errors that training raises by name, and how other people's are told. Imports nothing."""

from __future__ import annotations


class Refused(ValueError):
    """No example can be asked. All ranks find it out alike, and raise it."""


def first_line(error: BaseException) -> str:
    """torch's go on with a trace of its own."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
