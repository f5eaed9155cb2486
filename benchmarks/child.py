"""Programs that a suite runs beside itself: each says one JSON object, or it is told how it ended."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

LAST_WORDS = 2000
"""Characters of standard error that an error shows."""


def answer_of(name: str, line: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs the command to its end; the last line it prints, read. RuntimeError: see `read`."""
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | dict(environment or {}))
    return read(name, done.returncode, (done.stdout.splitlines() or [""])[-1], done.stderr)


def read(name: str, status: int, said: str | bytes, words: str = "") -> dict[str, Any]:
    """What a program that has ended said. RuntimeError: it failed, was killed, or said nothing that can be read."""
    end = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    if status:
        raise RuntimeError(f"{name} {end}{': ' if words else ''}{words[-LAST_WORDS:]}")
    try:
        found: dict[str, Any] = json.loads(said)
    except ValueError:
        raise RuntimeError(f"{name} {end}, but said {said[:200]!r} instead of a JSON object") from None
    return found
