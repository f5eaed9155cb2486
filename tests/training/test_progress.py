"""What commands say of how far they are, where there is no terminal."""

from __future__ import annotations

import pytest
from vtengine_training.progress import Progress


def test_a_line_now_and_then_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Progress({"low": 30, "high": 30}, clock=lambda: now) as progress:
        for name in ("low", "high"):
            for done in range(1, 31):
                now += 0.9
                progress.update(name, done, f"{done} right")
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{name}  {done}/30  {done} right" for name in ("low", "high") for done in (12, 24, 30)]


def test_one_task_needs_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress({"": 1}) as progress:
        progress.update("", 1)
    assert capsys.readouterr().err == "1/1\n"
