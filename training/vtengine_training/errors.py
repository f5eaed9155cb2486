"""How other people's errors are told. Imports nothing."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """torch's go on with a trace of its own."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
