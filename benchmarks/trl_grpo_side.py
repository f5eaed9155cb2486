"""One side of the comparison with TRL, in a process of its own: `trl_grpo_side.py vtengine|trl SPEC.json`.

Prints one JSON object: seconds of each step, peak memory, and what was trained on. A step is the same on both sides:
`prompts` questions about one image each, shown at full resolution, `n` sampled replies to each, a reward, one update of
all weights with AdamW. The reward is drawn at random: every group has spread, so both sides train on every sample.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import peak_mib

ROOT = Path(__file__).resolve().parent.parent
for _folder in ("training", "kernels", "."):
    sys.path.insert(0, str(ROOT / _folder))

Spec = dict[str, Any]
_prompts: dict[str, str] = {}
"""SHA-256 of the prompt's token ids by question, as this side has tokenised them."""


def episode_reward(episode: Any, example: Any) -> float:
    """The reward as vtengine calls it."""
    ids = episode.transcript.token_ids[: episode.turns[0].completion.prompt_tokens]
    _prompts.setdefault(example.id, digest(ids))
    return random.random()


def trl_reward(completions: list[Any], **_: Any) -> list[float]:
    """The reward as TRL calls it."""
    return [random.random() for _ in completions]


def digest(ids: Any) -> str:
    return hashlib.sha256(json.dumps([int(token) for token in ids]).encode()).hexdigest()


def run_vtengine(spec: Spec) -> dict[str, Any]:
    from vtengine_training.trainer.command import train
    from vtengine_training.trainer.config import GrpoConfig
    from vtengine_training.trainer.loop import Run

    from vtengine.config import build

    rollout = {key: spec[key] for key in ("prompts", "n", "max_new_tokens")}
    config = build(
        GrpoConfig,
        {
            "model": spec["model"],
            "output": spec["output"],
            "device": "cpu",
            "threads": spec["threads"],
            "steps": spec["steps"],
            "data": {"files": [spec["questions"]]},
            "rollout": rollout
            | {"resolution": "high", "max_turns": 1, "max_refill": 1.0, "kv_mib": 256}
            | {"concurrency": spec["prompts"] * spec["n"]},
            "reward": {"accuracy": "function", "function": "trl_grpo_side:episode_reward", "penalty": {"form": "off"}},
            "update": {"learning_rate": spec["learning_rate"], "max_tokens": spec["max_tokens"]},
            "checkpoint": {"every": 10**6},
        },
    )
    run = Run(config)
    rows: list[dict[str, float]] = []
    clock = Clock()

    def report(figures: dict[str, float]) -> None:
        rows.append(figures)
        clock.tick()

    loaded = peak_mib()
    clock.tick()
    asyncio.run(train(run, report))
    return clock.steps() | {
        "rollout_s": [row["time/rollout"] for row in rows],
        "samples": [row["groups/used"] * spec["n"] for row in rows],
        "response_length": [row["response_length/mean"] for row in rows],
        "loaded_mib": loaded,
    }


def run_trl(spec: Spec) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, TrainerCallback
    from trl import GRPOTrainer

    rows = [json.loads(line) for line in Path(spec["questions"]).read_text().splitlines()]
    processor = AutoProcessor.from_pretrained(spec["model"], padding_side="left")
    to_prompt = messages(spec)
    samples = spec["prompts"] * spec["n"]

    def load(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        chosen = [rows[index] for index in batch["row"]]
        return {"prompt": [to_prompt(row) for row in chosen], "image": [image_of(spec, row) for row in chosen]}

    data = Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(load)
    clock = Clock()

    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(spec["model"], dtype=torch.float32)
    trainer = GRPOTrainer(
        model=model, reward_funcs=trl_reward, args=trl_config(spec), train_dataset=data, processing_class=processor,
        callbacks=[Steps()],
    )  # fmt: skip
    loaded = peak_mib()
    trainer.train()
    for row in rows:
        made = processor.apply_chat_template(
            [filled(to_prompt(row), image_of(spec, row))], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        _prompts[str(row["id"])] = digest(made["input_ids"][0])
    logged = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry]
    return clock.steps() | {
        "samples": [samples] * spec["steps"],
        "response_length": [entry["completions/mean_length"] for entry in logged],
        "loaded_mib": loaded,
    }


def trl_config(spec: Spec) -> Any:
    """One update per step over all samples, nothing on top, nothing written."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=spec["output"],
        max_steps=spec["steps"],
        per_device_train_batch_size=spec["micro_batch"],
        gradient_accumulation_steps=spec["prompts"] * spec["n"] // spec["micro_batch"],
        num_generations=spec["n"],
        max_completion_length=spec["max_new_tokens"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        loss_type="grpo",
        beta=0.0,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )


def messages(spec: Spec) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """The prompt that vtengine makes for one full-resolution turn, as messages for a chat template."""
    from vtengine.protocol.profile import load_profile

    profile = load_profile(Path(spec["model"]))

    def make(row: dict[str, Any]) -> list[dict[str, Any]]:
        content = []
        for part in re.split(r"(\{image\}|\{question\})", profile["direct.user"]):
            if part == "{image}":
                content.append({"type": "image"})
            elif part:
                content.append({"type": "text", "text": row["question"] if part == "{question}" else part})
        return [{"role": "system", "content": profile["direct.system"]}, {"role": "user", "content": content}]

    return make


def filled(prompt: list[dict[str, Any]], image: Any) -> list[dict[str, Any]]:
    parts = [part | {"image": image} if part["type"] == "image" else part for part in prompt[1]["content"]]
    return [
        {"role": "system", "content": [{"type": "text", "text": prompt[0]["content"]}]},
        {"role": "user", "content": parts},
    ]


def image_of(spec: Spec, row: dict[str, Any]) -> Any:
    from PIL import Image

    with Image.open(Path(spec["questions"]).parent / row["image"]) as image:
        return image.convert("RGB")


class Clock:
    """Wall and CPU time (all threads of the process) at the end of each step."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []

    def tick(self) -> None:
        self.ticks.append((time.perf_counter(), time.process_time()))

    def steps(self) -> dict[str, list[float]]:
        pairs = list(itertools.pairwise(self.ticks))
        return {"step_s": [b[0] - a[0] for a, b in pairs], "cpu_s": [b[1] - a[1] for a, b in pairs]}


def main() -> None:
    side, path = sys.argv[1:]
    spec = json.loads(Path(path).read_text())
    torch.set_num_threads(spec["threads"])
    random.seed(spec["seed"])
    torch.manual_seed(spec["seed"])
    found = {"vtengine": run_vtengine, "trl": run_trl}[side](spec)
    # this file is imported a second time under its own name by the dotted path of the reward
    own = sys.modules.get("trl_grpo_side")
    prompts = _prompts or getattr(own, "_prompts", {})
    print(json.dumps(found | {"peak_mib": peak_mib(), "prompts": prompts}))


if __name__ == "__main__":
    main()
