"""Our GRPO trainer against TRL's GRPOTrainer on the same task, model, prompts, group size and lengths, on the CPU.

One step: 8 questions about one image each at full resolution, n sampled replies to each in one turn, a reward, one
AdamW update of all weights in float32; no KL term, no activation checkpointing. Each side runs in a process of its own,
the sides taking turns; the first step of a process is left out. See trl_grpo_side.py for what each side is told.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from child import answer_of
from vtengine_training.glance.export import write_questions

from vtengine.cli.models import shipped_model

ROOT = Path(__file__).resolve().parents[2]
TESTS = ["tests/training/trainer/test_update.py", "tests/training/grpo"]
PROMPTS, STEPS, ROUNDS = 8, 4, 2
GROUPS = (8, 16)
SIDES = ("vtengine", "trl")
_COLUMNS = {
    "side": "Trainer",
    "n": "Replies per prompt",
    "samples_per_s": "Samples/s",
    "step_s": "Seconds per step",
    "cpu_s": "CPU seconds per step",
    "peak_mib": "Peak memory, MiB",
    "loaded_mib": "Of that before the first step, MiB",
    "response_length": "Tokens per reply",
    "speedup": "Samples/s against TRL",
}
TABLES = {"trl-grpo": {"columns": _COLUMNS}}


def run(context: Any) -> list[dict[str, Any]]:
    python = peers_python()
    prompts, steps, rounds = (2, 2, 1) if context.quick else (PROMPTS, STEPS, ROUNDS)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        write_questions(Path(place), "train", 4, prompts * steps, balanced=False)
        for n in GROUPS[:1] if context.quick else GROUPS:
            found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for index in range(rounds):
                for side in SIDES if index % 2 == 0 else SIDES[::-1]:
                    spec = specification(Path(place), prompts, n, steps, index)
                    found[side].append(run_side(python, side, spec, Path(place)))
            rows += compare(found, n)
    return rows


def specification(place: Path, prompts: int, n: int, steps: int, index: int) -> dict[str, Any]:
    """What both sides are told; each reads what concerns it."""
    return {
        "model": str(shipped_model("glance-sft")),
        "questions": str(place / "questions.jsonl"),
        "output": str(place / f"run-{n}-{index}"),
        "prompts": prompts,
        "n": n,
        "steps": steps,
        "max_new_tokens": 64,
        "learning_rate": 1e-6,
        "threads": 1,
        "max_tokens": 4096,  # of a packed micro-batch of ours
        "micro_batch": 8,  # samples of a padded one of TRL's: its default; 16 and 32 took as long, and more memory
        "seed": index,
    }


def compare(found: dict[str, list[dict[str, Any]]], n: int) -> list[dict[str, Any]]:
    """A row per side. RuntimeError where the two did not see the same prompts."""
    prompts = [one["prompts"] for side in SIDES for one in found[side]]
    if any(one != prompts[0] for one in prompts):
        raise RuntimeError("trl_grpo: the sides tokenised the prompts differently, so there is nothing to compare")
    rows = [_row(side, n, found[side]) for side in SIDES]
    return [row | {"speedup": row["samples_per_s"] / rows[-1]["samples_per_s"]} for row in rows]


def run_side(python: str, side: str, spec: dict[str, Any], place: Path) -> dict[str, Any]:
    """One process. RuntimeError with its last words if it fails."""
    path = place / "spec.json"
    shutil.rmtree(spec["output"], ignore_errors=True)
    path.write_text(json.dumps(spec), encoding="utf-8")
    threads = {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [python, str(ROOT / "benchmarks" / "trl_grpo_side.py"), side, str(path)]
    return answer_of(f"trl_grpo_side.py {side}", command, threads)


def _row(side: str, n: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all steps of all rounds but each round's first; the most memory of any round."""
    seconds = [second for one in runs for second in one["step_s"][1:]]
    samples = [count for one in runs for count in one["samples"][1:]]
    lengths = [length for one in runs for length in one["response_length"][1:]]
    return {
        "side": side,
        "n": n,
        "rounds": len(runs),
        "steps": len(seconds),
        "samples_per_step": statistics.median(samples),
        "step_s": statistics.median(seconds),
        "cpu_s": statistics.median(second for one in runs for second in one["cpu_s"][1:]),
        "samples_per_s": statistics.median(a / b for a, b in zip(samples, seconds, strict=True)),
        "response_length": statistics.fmean(lengths),
        "loaded_mib": max(one["loaded_mib"] for one in runs),
        "peak_mib": max(one["peak_mib"] for one in runs),
    }


def peers_python() -> str:
    """An interpreter that has TRL: this one, or that of `make peers-venv`. RuntimeError where there is none."""
    if importlib.util.find_spec("trl") is not None:
        return sys.executable
    peers = ROOT / ".venv-peers" / "bin" / "python"
    if not peers.is_file():
        raise RuntimeError("trl_grpo: TRL is not installed here; run it with `make bench-peers`")
    return str(peers)
