"""Importing is free: what needs no torch loads no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "numpy", "PIL", "tokenizers", "safetensors", "matplotlib")
LIGHT = ("vtengine", "vtengine.protocol", "vtengine.config", "vtengine.vision.plan", "vtengine.engine.base")
HELP = [("vtengine.cli", ["--help"]), ("vtengine.cli", ["generate", "--help"]), ("vtengine_training.cli", ["--help"])]


def loaded_after(repo_root: Path, code: str) -> set[str]:
    """The heavy modules in `sys.modules` after `code` ran in a fresh interpreter."""
    program = f"import json, sys\n{code}\nprint()\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    folders = [str(repo_root / name) for name in (".", "kernels", "training")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repo_root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules(repo_root: Path, module: str) -> None:
    loaded = loaded_after(repo_root, f"import {module}")
    assert loaded == set()


@pytest.mark.parametrize(("module", "arguments"), HELP, ids=lambda value: str(value))
def test_help(repo_root: Path, module: str, arguments: list[str]) -> None:
    code = (
        f"from {module} import main\n"
        f"try:\n    status = main({arguments!r})\n"
        "except SystemExit as stop:\n    status = stop.code\n"
        "assert not status, status"
    )
    assert loaded_after(repo_root, code) == set()
