"""Two-turn batches: with resumption and without, against `transformers` `generate`, and against one view only.

256 held-out questions about generated pictures, the shipped model, greedy. Every run starts with empty caches. The
yardstick gets the same prompts from the same episode loop (see transformers_backend.py). Where speed is measured, every
other picture is made to be asked about twice (see asking_backend.py), so that the figures do not hang on how often a
checkpoint asks; where accuracy is, the model does as it will.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers_backend import TransformersBackend
from two_turn_run import Asked, Run, account, held_out_questions, model_folder, run_once, same_replies

from vtengine.cli.engine import EngineSetup, start_engines
from vtengine.engine.base import Backend
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.model import Qwen2_5_VL, load_model
from vtengine.protocol.conversation import Limits
from vtengine.rollout.tokenizer import Tokenizer

TESTS = ["tests/engine", "tests/rollout"]
QUESTIONS, CONCURRENCIES, ROUNDS = 256, (1, 8, 64), 3
ENGINES = 2  # of --data-parallel, at the highest concurrency
ASK_ONE_IN = 2
YARDSTICKS = ((1, 1), (64, 64))  # (concurrency, most requests in one padded call)

_SPEED = {
    "engine": "Engine",
    "engines": "Processes",
    "concurrency": "Concurrency",
    "resumption": "Resumption",
    "threads": "Threads",
    "questions_per_s": "Questions/s",
    "tokens_per_s": "Tokens/s",
    "ttft_turn2_ms": "First token of turn 2, ms",
    "prefill_tokens": "Tokens prefilled",
    "images_encoded": "Images encoded",
    "same_replies": "Same replies",
    "speedup_sequential": "Against transformers, one by one",
    "speedup_batched": "Against transformers, padded batches",
}
_MODES = {
    "resolution": "Resolution",
    "accuracy": "Accuracy",
    "upscale_ratio": "Upscaled",
    "visual_tokens": "Visual tokens",
    "visual_ratio": "Against always-high",
    "ms_per_question": "ms per question",
    "cpu_ms_per_question": "CPU ms per question",
}
TABLES = {
    "two-turn-speed": {"columns": _SPEED, "where": {"part": "speed"}},
    "two-turn-modes": {"columns": _MODES, "where": {"part": "modes"}},
}


def run(context: Any) -> list[dict[str, Any]]:
    folder = model_folder()
    asked = held_out_questions(12 if context.quick else QUESTIONS)
    model = load_model(folder, dtype=torch.float32).requires_grad_(False)
    run_once(folder, partial(embedded, model, 4, True), asked[:8], 4)  # warm-up: allocator, threads, compiled op
    return speed(context, folder, model, asked) + modes(context, folder, model, asked)


def embedded(model: Qwen2_5_VL, concurrency: int, resume: bool, tokenizer: Tokenizer) -> Backend:
    return EmbeddedEngine(model, tokenizer, EngineConfig(max_running=concurrency, resume=resume))


def side_by_side(folder: Path, concurrency: int, tokenizer: Tokenizer) -> Backend:
    del tokenizer
    return start_engines(ENGINES, EngineSetup(str(folder), "cpu", "float32", concurrency))


def yardstick(folder: Path, batch: int, tokenizer: Tokenizer) -> Backend:
    return TransformersBackend(folder, batch)


def speed(context: Any, folder: Path, model: Qwen2_5_VL, asked: list[Asked]) -> list[dict[str, Any]]:
    """Rounds are interleaved over all sides; the yardstick, which is slow and steady, takes part in the first."""
    concurrencies = (1, 8) if context.quick else CONCURRENCIES
    sides = [(concurrency, resume, 1) for concurrency in concurrencies for resume in (True, False)]
    if torch.get_num_threads() >= ENGINES:
        sides.append((concurrencies[-1], True, ENGINES))
    ours: dict[tuple[int, bool, int], list[Run]] = {side: [] for side in sides}
    yardsticks: dict[tuple[int, int], list[Run]] = {}
    for index in range(1 if context.quick else ROUNDS):
        for concurrency, resume, engines in sides if index % 2 == 0 else sides[::-1]:
            one, several = partial(embedded, model, concurrency, resume), partial(side_by_side, folder, concurrency)
            done = run_once(folder, one if engines == 1 else several, asked, concurrency, ask_one_in=ASK_ONE_IN)
            ours[concurrency, resume, engines].append(done)
        if index == 0:
            for concurrency, batch in YARDSTICKS:
                backend = partial(yardstick, folder, batch)
                yardsticks[concurrency, batch] = [run_once(folder, backend, asked, concurrency, ask_one_in=ASK_ONE_IN)]
    rows = [
        {"engine": "vtengine", "engines": n, "concurrency": at, "resumption": "on" if resume else "off", "runs": runs}
        for (at, resume, n), runs in ours.items()
    ] + [
        {"engine": f"transformers, batch {b}", "engines": 1, "concurrency": at, "resumption": "none", "runs": runs}
        for (at, b), runs in yardsticks.items()
    ]
    return [_speed_row(row, row.pop("runs"), asked, yardsticks) for row in rows]


def _speed_row(
    row: dict[str, Any], runs: list[Run], asked: list[Asked], yardsticks: dict[tuple[int, int], list[Run]]
) -> dict[str, Any]:
    """`speedup_*`: questions/s over those of the yardstick; `same_replies`: against its calls one by one."""
    figures = account(runs, asked)
    (one_by_one,), (batched,) = (yardsticks[side] for side in YARDSTICKS)
    return {
        "part": "speed",
        **row,
        "threads": torch.get_num_threads(),
        **figures,
        "same_replies": same_replies(runs[-1], one_by_one),
        "speedup_sequential": figures["questions_per_s"] * one_by_one.wall_s / len(asked),
        "speedup_batched": figures["questions_per_s"] * batched.wall_s / len(asked),
    }


def modes(context: Any, folder: Path, model: Qwen2_5_VL, asked: list[Asked]) -> list[dict[str, Any]]:
    """Adaptive against always-low and always-high, all else equal."""
    names = ("adaptive", "low", "high")
    concurrency = 8 if context.quick else CONCURRENCIES[-1]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for index in range(1 if context.quick else ROUNDS):
        for name in names[index % 3 :] + names[: index % 3]:
            limits = Limits(name, 2 if name == "adaptive" else 1)
            runs[name].append(run_once(folder, partial(embedded, model, concurrency, True), asked, concurrency, limits))
    rows = [
        {"part": "modes", "resolution": name, "concurrency": concurrency, **account(runs[name], asked)}
        for name in names
    ]
    high = rows[-1]["visual_tokens"]
    return [{**row, "visual_ratio": row["visual_tokens"] / high} for row in rows]
