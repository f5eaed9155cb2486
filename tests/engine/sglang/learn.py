"""The same GRPO run over the embedded engine and over a real SGLang: python -m tests.engine.sglang.learn FOLDER

Prints one JSON object: for each, mean reward and largest mismatch of logprobs, step by step. SGLang on a CPU does
not heed seeds, so its samples are others; what must be equal is that it samples from the learner's weights.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from vtengine_training.trainer.command import train
from vtengine_training.trainer.config import GrpoConfig
from vtengine_training.trainer.loop import Run

from tests.engine.sglang import real
from tests.training.trainer.toy import rewarder
from vtengine.config import build

PROFILE = Path(__file__).resolve().parents[3] / "vtengine" / "protocol" / "profiles" / "glance.toml"


def config(folder, backend, **rollout):
    data = {
        "model": str(folder / "model"),
        "output": str(folder / f"run-{backend}"),
        "profile": str(PROFILE),
        "device": "cpu",
        "threads": 1,
        "steps": 10,
        "data": {"files": [str(folder / "questions.jsonl")]},
        "rollout": {"prompts": 4, "n": 8, "max_new_tokens": 6, "kv_mib": 16, "image_cache_mib": 16, "backend": backend},
        "update": {"learning_rate": 1e-2, "max_tokens": 400},
        "checkpoint": {"every": 100},
    }
    data["rollout"] |= rollout
    return build(GrpoConfig, data)


def write_questions(folder, count=4):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (84, 84, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append({"id": f"q{number}", "image": f"{number}.png", "question": f"{number}?", "answer": "1"})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder, backend, **rollout):
    rows = []
    asyncio.run(train(Run(config(folder, backend, **rollout), rewarder()), rows.append))
    return {name: [row[name] for row in rows] for name in ("reward/mean", "mismatch/max", "version", "staleness/mean")}


def main(folder):
    os.environ.update(real.ENVIRONMENT)
    (folder / "model").mkdir()
    real.write_toy_checkpoint(folder / "model")
    write_questions(folder)
    print(json.dumps({"embedded": run(folder, "embedded"), "sglang": run(folder, "sglang", release_memory=True)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
