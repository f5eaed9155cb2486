"""Micro level: benchmarks/micro by pytest-benchmark. Each op as the product runs it here, and its plain reference.

One candidate after another, not in turns: for short calls, to see where an op lost what it had. The suites of single
ops compare with other projects, in interleaved rounds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = [
    f"tests/kernels/test_{name}.py"
    for name in (
        "patchify_values",
        "token_logprob",
        "token_sample",
        "token_truncation",
        "grpo_loss",
        "prefix_attention",
        "shared_prefix_attention",
        "visual_scatter",
        "layer_ops",
    )
]
TABLES = {
    "kernels": {
        "columns": {
            "op": "Op",
            "case": "Case",
            "ms": "ms",
            "min_ms": "Best, ms",
            "reference_ms": "Reference, ms",
            "reference_ratio": "Faster than the reference by",
        }
    }
}
MICRO = Path(__file__).resolve().parent.parent / "micro"
TIMES = {False: ("--benchmark-min-rounds=5", "--benchmark-max-time=0.7"), True: ("--benchmark-max-time=0.001",)}


def run(context: Any) -> list[dict[str, Any]]:
    """One row per op and case, in milliseconds: medians, and the shortest round."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise RuntimeError("pytest-benchmark is not installed: `pip install pytest-benchmark` (extra `dev`)")
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder) / "found.json", sorted(MICRO.glob("bench_*.py")), quick=context.quick)
    return compared(found)


def compared(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows from what pytest-benchmark found of each implementation."""
    groups: dict[str, dict[str, Any]] = {}
    for each in found:
        groups.setdefault(each["group"], {})[each["extra_info"]["impl"]] = each
    return [row(group["auto"], group["ref"]["stats"]["median"]) for group in groups.values()]


def measured(path: Path, files: list[Path], *, quick: bool) -> list[dict[str, Any]]:
    """What pytest-benchmark found. RuntimeError: a benchmark failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--timeout=0"]
    command += [*TIMES[quick], f"--benchmark-json={path}", "--benchmark-disable-gc", *map(str, files)]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    # beside other workers of pytest-xdist, whose variables these are, pytest-benchmark would measure nothing
    done = subprocess.run(command, cwd=MICRO.parent.parent, env=alone, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"benchmarks/micro: pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    made: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    return made


def row(found: dict[str, Any], reference_s: float) -> dict[str, Any]:
    stats, facts = found["stats"], found["extra_info"]
    return {
        "op": facts["op"],
        "case": facts["case"],
        "device": facts["device"],
        "threads": facts["threads"],
        "rounds": stats["rounds"],
        "ms": 1e3 * stats["median"],
        "min_ms": 1e3 * stats["min"],
        "reference_ms": 1e3 * reference_s,
        "reference_ratio": reference_s / stats["median"],
    }
