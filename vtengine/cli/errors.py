"""Errors that end a command with one line and an exit status, never a traceback.

Exit statuses of `vtengine`: 0 done · 1 the run could not go on · 2 bad usage · 3 some row was rejected or failed ·
130 Ctrl-C · 143 SIGTERM.
"""

from __future__ import annotations

OK = 0
STOPPED = 1
USAGE = 2
ROWS_REJECTED = 3
INTERRUPTED = 130


class CliError(Exception):
    """Ends the command: `message` is printed on one line after `vtengine:`, then the process exits with `status`."""

    status = STOPPED

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        if status is not None:
            self.status = status


class UsageError(CliError):
    """A flag, a path or a file that the user gave cannot be used; the message says which and what would work."""

    status = USAGE


def one_line(error: BaseException | str) -> str:
    """The message of `error` on one line, for stderr and for records."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def reason(error: OSError) -> str:
    """What is wrong with a file, for messages that name the file themselves."""
    return error.strerror or one_line(error)
