"""Progress on stderr: sparse lines without a terminal, a bar on one."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtengine.cli.progress import LINE_SECONDS, Progress


def test_lines_are_sparse_and_say_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 0.0
    progress = Progress(100, 20, quiet=False, clock=lambda: now_s)
    for number in range(40):
        now_s += LINE_SECONDS / 20
        progress.advance("rejected" if number == 3 else "answered", number % 2 == 0)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "40/100 rows, 2.0 rows/s, 10 upscaled, 1 rejected or failed, about 0:00:30 left",
        "60/100 rows, 2.0 rows/s, 20 upscaled, 1 rejected or failed, about 0:00:20 left",
    ]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 0.0
    progress = Progress(10, 0, quiet=True, clock=lambda: now_s)
    now_s = 1000.0
    progress.advance("answered", False)
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_bar_on_a_terminal(scripted: Callable[..., Any], questions: Callable[..., Any], tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "vtengine.cli",
        "generate",
        questions(12),
        "-o",
        tmp_path / "o.jsonl",
        *scripted(0.05),
    ]
    leader, terminal = pty.openpty()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(list(map(str, line)), stderr=terminal, stdout=subprocess.PIPE, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
        if not piece:
            break
        shown += piece
    assert process.wait(60) == 0
    assert process.stdout is not None and b"accuracy" in process.stdout.read()
    assert "━".encode() in shown and b"12/12" in shown and b"upscaled" in shown
