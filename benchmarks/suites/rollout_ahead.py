"""GRPO with and without `rollout.ahead`: learner and SGLang server on a core each, as on GPUs of their own.

The shipped cold start and its recipe with 8 prompts of 8 replies; weights go through a folder. Each run is a process of
its own, the two ways taking turns on one server; its first and last steps, which have nothing to overlap with, are left
out. SGLang without AMX is plain torch on a CPU, so rollouts are the longer part of a step.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peer_backend import SGLANG_FLAGS, SGLANG_PYTHON, sglang_server

from vtengine.cli.models import shipped_model

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "glance_grpo.toml"
TESTS = ["tests/training/trainer/test_ahead.py", "tests/training/trainer/test_rollout_engine.py"]
PROMPTS, N, STEPS, ROUNDS = 8, 8, 6, 2
SECONDS = ("step", "rollout", "learn", "wait", "publish")
TABLES = {
    "rollout-ahead": {
        "columns": {
            "ahead": "`rollout.ahead`",
            "step_s": "Step, s",
            "rollout_s": "Rollouts, s",
            "learn_s": "Learning, s",
            "wait_s": "Waited for rollouts, s",
            "publish_s": "New weights to the server, s",
            "speedup": "Steps/s against without",
        }
    }
}


def run(context: Any) -> list[dict[str, Any]]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 or not SGLANG_PYTHON.is_file():
        raise RuntimeError("rollout_ahead: needs two cores, and SGLang's environment (`make sglang-venv`)")
    steps, rounds = (3, 1) if context.quick else (STEPS, ROUNDS)
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        with _on_core(cores[-1]):
            server = stack.enter_context(sglang_server(shipped_model("glance-sft"), *SGLANG_FLAGS))
        stack.enter_context(_on_core(cores[0]))
        for index in range(rounds):
            for ahead in (False, True) if index % 2 == 0 else (True, False):
                found[ahead] += _train(server.url, ahead, steps, Path(place) / f"{index}-{ahead}")
    rows = [_row(ahead, measured) for ahead, measured in found.items()]
    return [row | {"speedup": rows[0]["step_s"] / row["step_s"]} for row in rows]


def _train(url: str, ahead: bool, steps: int, output: Path) -> list[dict[str, float]]:
    """The metrics of the steps of one run, but of the first and the last. RuntimeError: it failed."""
    settings = {
        "output": output,
        "threads": 1,
        "steps": steps,
        "rollout.backend": url,
        "rollout.ahead": str(ahead).lower(),
        "rollout.prompts": PROMPTS,
        "rollout.n": N,
        "rollout.max_refill": 1.0,
        "rollout.dump_every": 0,
        "update.minibatch_prompts": PROMPTS // 2,
        "update.warmup": 0,
        "checkpoint.every": 10**6,
        "validation.every": 0,
    }
    line = [sys.executable, "-m", "vtengine_training.cli", "grpo", str(CONFIG)]
    line += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    folders = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "training"))
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": folders}, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"vtengine-train ended with status {done.returncode}: {done.stderr[-2000:]}")
    rows = [json.loads(row) for row in (output / "metrics.jsonl").read_text().splitlines()]
    return rows[1:-1]


def _row(ahead: bool, rows: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the steps of all rounds."""
    seconds = {f"{name}_s": statistics.median(row[f"time/{name}"] for row in rows) for name in SECONDS}
    return {"ahead": ahead, "steps": len(rows), "samples": PROMPTS * N, **seconds}


@contextmanager
def _on_core(core: int) -> Iterator[None]:
    """What is started inside stays on that core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
