"""What the documents show under a `$ vtengine ...` line is what the command prints, all but the seconds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vtengine.cli import main
from vtengine.cli.models import shipped_model

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), *sorted((REPO / "examples").rglob("*.md"))]
SHOWN = [
    found for page in PAGES for found in re.findall(r"^\$ vtengine (.*)\n((?:.+\n)+?)```$", page.read_text(), re.M)
]


def without_seconds(text: str) -> str:
    return re.sub(r"\d+\.\d+ s\b", "_ s", text)


@pytest.mark.skipif(not (shipped_model() / "config.json").is_file(), reason="the shipped model is not in this tree")
@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_shown_output(
    command: str, output: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    assert main([*shlex.split(command), "--device", "cpu"]) == 0  # the pages of a GPU hold other numbers of tokens
    assert without_seconds(capfd.readouterr().out) == without_seconds(output)


def test_the_readme_shows_an_answer() -> None:
    assert any(command.startswith("ask ") for command, _ in SHOWN)
