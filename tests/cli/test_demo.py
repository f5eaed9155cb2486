"""The demo, as `make demo` runs it: the shipped model, at least 64 held-out questions and the photographs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vtengine.cli.models import shipped_model

REPO = Path(__file__).resolve().parents[2]
MAX_SECONDS = 180


def test_demo(tmp_path: Path) -> None:
    if not (shipped_model() / "config.json").is_file() or not (REPO / "examples/glance/questions.jsonl").is_file():
        pytest.skip("the shipped model or its questions are not in this tree")
    folders = os.pathsep.join(str(REPO / folder) for folder in (".", "kernels", "training"))
    started_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, REPO / "examples/demo.py", tmp_path], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": folders},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started_s < MAX_SECONDS
    for name in (
        "accuracy",
        "upscale ratio",
        "against always-high",
        "resumed from the cache",
        "throughput",
        "answers.html",
    ):
        assert name in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sum("correct" in row for row in rows) >= 64 and any(row["id"].startswith("photo-") for row in rows)
    assert (tmp_path / "answers.html").stat().st_size > 100_000
    for turn in (turn for row in rows for turn in row["turns"][1:]):
        assert turn["cached_tokens"] > 0 and all(image["encoded"] for image in turn["images"])


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--fast"], 2), (["a", "b"], 2)])
def test_odd_arguments_of_the_demo_print_its_use(tmp_path: Path, arguments: list[str], status: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, REPO / "examples/demo.py", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status and "make demo" in done.stdout
    assert not list(tmp_path.iterdir())
