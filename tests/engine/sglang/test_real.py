"""A real SGLang on the CPU, in a process of its own: `make test-sglang`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
LIMIT_S = 900

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(LIMIT_S)]


def child(*arguments, **environment):
    """Runs Python in a process group of its own, which is gone afterwards, and returns its output."""
    paths = os.pathsep.join(str(REPO / part) for part in ("", "kernels", "training"))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPO, env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True, text=True, timeout=LIMIT_S, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("kind", ["sglang_http", "sglang_engine"])
def test_it_conforms(kind):
    output = child(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engine/conformance", VTENGINE_CONFORMANCE=kind
    )
    assert "passed" in output and "failed" not in output
