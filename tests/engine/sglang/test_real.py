"""A real SGLang on the CPU, in a process of its own: `make test-sglang`."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("kind", ["sglang_http", "sglang_engine"])
def test_episodes_equal_those_of_the_embedded_engine(kind):
    folder = REPO / "vtengine" / "assets" / "glance"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the shipped model is not in this tree")
    print(output := child("-m", "tests.engine.sglang.compare", kind, str(folder)).splitlines()[-1])
    report = json.loads(output)
    assert report["episodes"] == 3 and report["statuses"][0] == report["statuses"][1], report
    assert report["logprobs"] < 1e-4
    assert all(new <= prefilled <= new + 1 for prefilled, new in report["new_in_turn_2"]), report["new_in_turn_2"]
    assert report["encoded"] == [[False, True]] * 3
    difference, cached, encoded = report["cold"]
    assert difference < 1e-4 and cached == 0 and encoded == [True, True]
    assert report["processor"] < 1e-5
    assert report["update"] < 1e-4 < report["update_moved"] and report["version"] == 1
    status, error = report["trick"]
    if kind == "sglang_engine":
        assert status not in ("rejected", "failed"), error
    else:
        assert status == "rejected" and "text_spells_marker" in error
