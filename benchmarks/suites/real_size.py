"""A question in two turns on the CPU at the sizes of Qwen2.5-VL-3B, against `transformers`.

Random weights in bfloat16, one checkpoint that both load; made-up pixels and ids; greedy. Turn 1 shows 256 visual
tokens, turn 2 appends 1,024. transformers is used as its users do: a `generate` call for each turn, over the whole
context. Takes 17 GiB of memory, 8 GB of disk and about a quarter of an hour; `--quick` runs a small model.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory import available_mib
from qwen_sizes import PAD, SHAPES, SMALL, NoText, config_of, view_of
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.generation.streamers import BaseStreamer
from transformers_backend import full_rows

from vtengine.engine.base import ImageInput, Request, SamplingParams
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.model import VLModel, load_model

TESTS = ["tests/kernels/test_few_rows.py", "tests/model/test_parity.py", "tests/engine/embedded/test_engine.py"]
SIDES = (32, 64)  # patches of the views: 256 and 1,024 visual tokens
TEXT_TOKENS, NEW_TOKENS, ROUNDS = 64, 16, 2
NEEDED_GIB = 17
TOGETHER = 8  # questions at a time, each about a picture of its own; the engine alone
TABLES = {
    "real-size": {
        "columns": {
            "model": "Model",
            "engine": "Engine",
            "together": "Questions at a time",
            "ttft_turn1_s": "First token of turn 1, s",
            "ttft_turn2_s": "First token of turn 2, s",
            "tokens_per_s": "Tokens/s after the first, one question",
            "s_per_question": "Seconds per question",
            "speedup": "Times as fast as transformers",
            "same_ids": "Same ids",
        }
    }
}


@dataclass(frozen=True)
class Turn:
    """What was written. first_s, last_s: from the turn's request to the first token and to the last."""

    token_ids: tuple[int, ...]
    first_s: float
    last_s: float


@dataclass(frozen=True)
class Asked:
    """Questions asked together: the seconds that all of them took, and the turns of each."""

    wall_s: float
    questions: Sequence[tuple[Turn, ...]]


Side = Callable[[int, tuple[int, int]], Asked]
"""Given the number of the first picture, and the views' sides."""


def run(context: Any) -> list[dict[str, Any]]:
    name, sizes = ("small", SMALL) if context.quick else ("3B", SHAPES["3B"])
    if not context.quick and (available_gib := available_mib() / 1024) < NEEDED_GIB:
        raise RuntimeError(
            f"this suite needs {NEEDED_GIB} GiB of memory, {available_gib:.0f} are there; --quick needs less"
        )
    rounds, together = (1, 2) if context.quick else (ROUNDS, TOGETHER)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), sizes)
        ours = load_model(folder, dtype=torch.bfloat16).requires_grad_(False)
        theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
        sides: dict[tuple[str, int], Side] = {
            ("vtengine", 1): partial(ask_vtengine, ours, 1),
            ("transformers", 1): partial(ask_transformers, theirs),
            ("vtengine", together): partial(ask_vtengine, ours, together),
        }
        for side in sides.values():
            side(1000, (4, 8))  # a warm-up: weights come into memory, threads start
        asked: dict[tuple[str, int], list[Asked]] = {key: [] for key in sides}
        for index in range(rounds):
            for key in list(sides)[:: 1 if index % 2 == 0 else -1]:
                asked[key].append(sides[key](100 * index, SIDES))
    peer = asked["transformers", 1]
    return [{"model": name, **row(*key, runs, peer)} for key, runs in asked.items()]


def row(engine: str, together: int, runs: Sequence[Asked], peer: Sequence[Asked]) -> dict[str, Any]:
    """`same_ids`: share of the ids that transformers wrote at the same place, of the pictures that both were shown."""
    questions = [question for one in runs for question in one.questions]
    s_per_question = statistics.median(one.wall_s / len(one.questions) for one in runs)
    decoding = [(len(turn.token_ids) - 1) / (turn.last_s - turn.first_s) for turns in questions for turn in turns]
    pairs = [
        pair
        for one, other in zip(runs, peer, strict=True)
        for mine, yours in zip(one.questions, other.questions, strict=False)
        for turn, same in zip(mine, yours, strict=True)
        for pair in zip(turn.token_ids, same.token_ids, strict=True)
    ]
    return {
        "engine": engine,
        "together": together,
        "rounds": len(runs),
        "ttft_turn1_s": statistics.median(question[0].first_s for question in questions),
        "ttft_turn2_s": statistics.median(question[1].first_s for question in questions),
        "tokens_per_s": statistics.median(decoding),
        "s_per_question": s_per_question,
        "speedup": statistics.median(one.wall_s for one in peer) / s_per_question,
        "same_ids": sum(mine == yours for mine, yours in pairs) / len(pairs),
    }


def write_checkpoint(folder: Path, sizes: dict[str, int]) -> None:
    config = config_of(sizes).to_json()
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(Qwen2_5_VLConfig(**config), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def ask_vtengine(model: VLModel, together: int, first: int, sides: tuple[int, int]) -> Asked:
    return asyncio.run(_ask_vtengine(model, together, first, sides))


async def _ask_vtengine(model: VLModel, together: int, first: int, sides: tuple[int, int]) -> Asked:
    engine = EmbeddedEngine(model, NoText(), EngineConfig(max_running=together, kv_bytes=1 << 30))

    async def turn(name: str, ids: Sequence[int], images: Sequence[ImageInput]) -> Turn:
        clock = Clock()
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS)
        done = await engine.generate(Request(name, tuple(ids), tuple(images), sampling), clock.on_tokens)
        return clock.turn(done.token_ids)

    async def question(picture: int) -> tuple[Turn, ...]:
        images = [view_of(picture, side, torch.bfloat16) for side in sides]
        one = await turn(f"{picture}/0", ids := prompt(picture, images[0]), images[:1])
        return one, await turn(f"{picture}/1", continued(ids, one, images[1]), images)

    try:
        started_s = time.perf_counter()
        questions = await asyncio.gather(*(question(first + index) for index in range(together)))
        return Asked(time.perf_counter() - started_s, questions)
    finally:
        await engine.close()


def ask_transformers(model: Any, first: int, sides: tuple[int, int]) -> Asked:
    def turn(ids: Sequence[int], images: Sequence[ImageInput]) -> Turn:
        clock, tokens = Clock(), torch.tensor([ids])
        output = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == PAD).int(),
            pixel_values=torch.cat([full_rows(one.pixel_values) for one in images]),
            image_grid_thw=torch.tensor([one.grid_thw for one in images]),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            streamer=clock,
        )
        return clock.turn(output[0, len(ids) :].tolist())

    with torch.inference_mode():
        images = [view_of(first, side, torch.bfloat16) for side in sides]
        started_s = time.perf_counter()
        one = turn(ids := prompt(first, images[0]), images[:1])
        two = turn(continued(ids, one, images[1]), images)
        return Asked(time.perf_counter() - started_s, [(one, two)])


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when tokens come, from either engine."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._seen_s: list[float] = []
        self._prompt_is_next = True

    def on_tokens(self, token_ids: Sequence[int]) -> None:
        self._seen_s.append(time.perf_counter() - self._started_s)

    def put(self, value: torch.Tensor) -> None:
        """transformers shows the prompt first."""
        if not self._prompt_is_next:
            self.on_tokens(value.tolist())
        self._prompt_is_next = False

    def end(self) -> None:
        pass

    def turn(self, token_ids: Sequence[int]) -> Turn:
        return Turn(tuple(token_ids), self._seen_s[0], self._seen_s[-1])


def prompt(picture: int, view: ImageInput) -> list[int]:
    """Text, of which no two pictures have the same, and the view."""
    return [*((31 * picture + 7 * index) % 1000 for index in range(TEXT_TOKENS)), *[PAD] * view.visual_tokens]


def continued(ids: Sequence[int], turn: Turn, view: ImageInput) -> list[int]:
    return [*ids, *turn.token_ids, *[PAD] * view.visual_tokens, *range(TEXT_TOKENS)]
