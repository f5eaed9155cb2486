"""Runs code in a process of its own under Triton's interpreter, which must be chosen before triton is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OWN_FOLDERS = """import sys, types
for _name in ("benchmarks", "tests"):  # as in tests/conftest.py: installed packages may have these names
    sys.modules[_name] = types.ModuleType(_name)
    sys.modules[_name].__path__ = [_name]
"""


def run_interpreted(code: str, timeout_s: float = 300) -> Any:
    """What the code prints, one JSON value; asserts that it ends well."""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    done = subprocess.run(
        [sys.executable, "-c", OWN_FOLDERS + code],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
