"""How the cost of a question grows with the batch, the image and the number of turns, and that memory does not.

Straight on the embedded engine with made-up pixels and replies of fixed length: what is measured is the engine's work,
not what a model happens to say. The pool is kept small, so that the largest batches have to wait for pages.
"""

from __future__ import annotations

import asyncio
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from made_up import MadeUp
from two_turn_run import model_folder

from vtengine.engine.base import Completion
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.model import Qwen2_5_VL, load_model
from vtengine.rollout.tokenizer import Tokenizer

TESTS = ["tests/engine"]
PAGE_SIZE, NUM_PAGES, MAX_RUNNING = 16, 512, 64
NEW_TOKENS = 16
SIDE = 224  # pixels; 64 visual tokens
BATCHES, SIDES, TURNS = (1, 2, 4, 8, 16, 32, 64, 128), (112, 224, 448, 672, 896, 1120), 8

_COMMON = {"ms_per_question": "ms per question", "pages_peak": "Pages in use, peak", "pages_total": "Pages of the pool"}
TABLES = {
    "growth-batch": {"columns": {"batch": "Questions at once", **_COMMON}, "where": {"part": "batch"}},
    "growth-image": {
        "columns": {"side": "Image side, px", "visual_tokens": "Visual tokens", **_COMMON},
        "where": {"part": "image"},
    },
    "growth-turns": {
        "columns": {
            "turn": "Turn",
            "resumption": "Resumption",
            "prompt_tokens": "Context, tokens",
            "ms": "ms of this turn",
        },
        "where": {"part": "turns"},
    },
}


def run(context: Any) -> list[dict[str, Any]]:
    folder = model_folder()
    model, tokenizer = load_model(folder, dtype=torch.float32).requires_grad_(False), Tokenizer.load(folder)
    rounds = 1 if context.quick else 3
    bench = _Bench(model, tokenizer)
    asyncio.run(bench.batch(8))  # warm-up
    rows = [bench.batch_row(size, rounds) for size in (BATCHES[:3] if context.quick else BATCHES)]
    rows += [bench.image_row(side, rounds) for side in (SIDES[:2] if context.quick else SIDES)]
    for resume in (True, False):
        rows += bench.turn_rows(2 if context.quick else TURNS, rounds, resume)
    return rows


class _Bench:
    def __init__(self, model: Qwen2_5_VL, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer, self.made_up = model, tokenizer, MadeUp(tokenizer)

    def engine(self, resume: bool = True) -> EmbeddedEngine:
        config = EngineConfig(page_size=PAGE_SIZE, num_pages=NUM_PAGES, max_running=MAX_RUNNING, resume=resume)
        return EmbeddedEngine(self.model, self.tokenizer, config)

    async def batch(self, size: int, side: int = SIDE, new_tokens: int = NEW_TOKENS) -> tuple[float, float]:
        """(wall seconds, peak of pages in use) of `size` questions at once."""
        images = [self.made_up.image(side) for _ in range(size)]
        requests = [
            self.made_up.request(str(i), self.made_up.ask(image), [image], new_tokens) for i, image in enumerate(images)
        ]
        engine = self.engine()
        started_s, peak = time.perf_counter(), 0.0
        pending = {asyncio.create_task(engine.generate(request)) for request in requests}
        while pending:
            done, pending = await asyncio.wait(pending, timeout=0.005)
            peak = max(peak, engine.stats()["pages_in_use"])
            for task in done:
                task.result()
        wall_s = time.perf_counter() - started_s
        await engine.close()
        return wall_s, peak

    def batch_row(self, size: int, rounds: int) -> dict[str, Any]:
        runs = [asyncio.run(self.batch(size)) for _ in range(rounds)]
        return {"part": "batch", "batch": size, "visual_tokens": SIDE**2 // 784, **_figures(runs, size)}

    def image_row(self, side: int, rounds: int) -> dict[str, Any]:
        runs = [asyncio.run(self.batch(1, side, 1)) for _ in range(rounds)]
        return {"part": "image", "side": side, "visual_tokens": side**2 // 784, **_figures(runs, 1)}

    async def conversation(self, turns: int, resume: bool) -> list[Completion]:
        """One conversation; every turn appends an image and some text to all that was said."""
        engine, ids, images, completions = self.engine(resume), [], [], []
        for turn in range(turns):
            images.append(self.made_up.image(SIDE))
            ids += self.made_up.ask(images[-1])
            completions.append(await engine.generate(self.made_up.request(str(turn), ids, images, NEW_TOKENS)))
            ids += completions[-1].token_ids
        await engine.close()
        return completions

    def turn_rows(self, turns: int, rounds: int, resume: bool) -> list[dict[str, Any]]:
        runs = [asyncio.run(self.conversation(turns, resume)) for _ in range(rounds)]
        return [
            {
                "part": "turns",
                "turn": turn + 1,
                "resumption": "on" if resume else "off",
                "prompt_tokens": runs[0][turn].prompt_tokens,
                "prefill_tokens": runs[0][turn].prefill_tokens,
                "ms": 1e3 * statistics.median(run[turn].latency_s for run in runs),
            }
            for turn in range(turns)
        ]


def _figures(runs: list[tuple[float, float]], questions: int) -> dict[str, Any]:
    return {
        "ms_per_question": 1e3 * statistics.median(wall_s for wall_s, _ in runs) / questions,
        "pages_peak": int(max(peak for _, peak in runs)),
        "pages_total": NUM_PAGES,
        "rss_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels: batch, image, turns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    batch, image, turns = figure.subplots(1, 3)
    for axes, part, key, label in (
        (batch, "batch", "batch", "questions at once"),
        (image, "image", "visual_tokens", "visual tokens of the image"),
    ):
        found = [row for row in rows if row["part"] == part]
        axes.plot([row[key] for row in found], [row["ms_per_question"] for row in found], "o-", color="#2a6f97")
        axes.set(xlabel=label, ylabel="ms per question", ylim=(0, None))
    sizes = [row["batch"] for row in rows if row["part"] == "batch"]
    batch.set_xscale("log", base=2)
    batch.set_xticks(sizes, [str(size) for size in sizes])
    for resumption, colour in (("on", "#2a6f97"), ("off", "#c1666b")):
        found = [row for row in rows if row["part"] == "turns" and row["resumption"] == resumption]
        label = f"resumption {resumption}"
        turns.plot([row["turn"] for row in found], [row["ms"] for row in found], "o-", color=colour, label=label)
    turns.set(xlabel="turn", ylabel="ms of this turn", ylim=(0, None))
    turns.legend(frameon=False)
    for axes in (batch, image, turns):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
