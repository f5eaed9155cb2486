"""From which picture on, and up to how many second looks, is it cheaper to look low first?

Straight on the embedded engine, all questions of a run at once, pictures of noise and replies of fixed length, so that
one thing changes at a time. high: one turn with the whole picture. Adaptive: a turn with a quarter of its pixels; a
share of the questions then asks (a call of CALL_TOKENS) and gets the whole picture as a second turn. `break_even`: the
share at which both cost the same, on straight lines between those that were measured; none where low first never costs
more.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from made_up import MadeUp
from two_turn_run import model_folder

from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.model import Qwen2_5_VL, load_model
from vtengine.rollout.tokenizer import Tokenizer

TESTS = ["tests/engine"]
QUESTIONS, ROUNDS = 8, 3
SIDES = (224, 448, 672, 896, 1120)
SHARES = (0.0, 0.25, 0.5, 1.0)
ANSWER_TOKENS, CALL_TOKENS = 12, 25
NUM_PAGES = 8192

TABLES = {
    "look-twice": {
        "columns": {
            "side": "Picture side, px",
            "visual_tokens": "Visual tokens, whole",
            "high_ms": "Whole picture at once, ms per question",
            **{f"cost_{share:g}": f"Low first, {share:.0%} ask, against that" for share in SHARES},
            "break_even": "Break-even share",
        }
    }
}


def run(context: Any) -> list[dict[str, Any]]:
    folder = model_folder()
    model, tokenizer = load_model(folder, dtype=torch.float32).requires_grad_(False), Tokenizer.load(folder)
    bench = _Bench(model, tokenizer)
    asyncio.run(bench.high(SIDES[0]))  # warm-up
    sides, rounds = (SIDES[:2], 1) if context.quick else (SIDES, ROUNDS)
    return [bench.row(side, rounds) for side in sides]


class _Bench:
    def __init__(self, model: Qwen2_5_VL, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer, self.made_up = model, tokenizer, MadeUp(tokenizer)

    async def high(self, side: int) -> float:
        """Wall seconds of all questions, with empty caches."""

        async def ask(engine: EmbeddedEngine, index: int) -> None:
            image = self.made_up.image(side)
            request = self.made_up.request(str(index), self.made_up.ask(image), [image], ANSWER_TOKENS)
            await engine.generate(request)

        return await self._timed(ask)

    async def adaptive(self, side: int, share: float) -> float:
        async def ask(engine: EmbeddedEngine, index: int) -> None:
            low = self.made_up.image(side // 2)
            ids, asks = self.made_up.ask(low), index < share * QUESTIONS
            request = self.made_up.request(f"{index}/0", ids, [low], CALL_TOKENS if asks else ANSWER_TOKENS)
            first = await engine.generate(request)
            if asks:
                whole = self.made_up.image(side)
                ids = [*ids, *first.token_ids, *self.made_up.ask(whole)]
                await engine.generate(self.made_up.request(f"{index}/1", ids, [low, whole], ANSWER_TOKENS))

        return await self._timed(ask)

    async def _timed(self, ask: Any) -> float:
        config = EngineConfig(num_pages=NUM_PAGES, max_running=QUESTIONS)
        engine = EmbeddedEngine(self.model, self.tokenizer, config)
        began_s = time.perf_counter()
        await asyncio.gather(*(ask(engine, index) for index in range(QUESTIONS)))
        wall_s = time.perf_counter() - began_s
        await engine.close()
        return wall_s

    def row(self, side: int, rounds: int) -> dict[str, Any]:
        """Sides are interleaved in rounds; costs are medians of ratios within a round."""
        high: list[float] = []
        costs: dict[float, list[float]] = {share: [] for share in SHARES}
        for _ in range(rounds):
            high.append(asyncio.run(self.high(side)))
            for share in SHARES:
                costs[share].append(asyncio.run(self.adaptive(side, share)) / high[-1])
        cost = {share: statistics.median(found) for share, found in costs.items()}
        return {
            "side": side,
            "visual_tokens": side**2 // 784,
            "questions": QUESTIONS,
            "rounds": rounds,
            "high_ms": 1e3 * statistics.median(high) / QUESTIONS,
            **{f"cost_{share:g}": cost[share] for share in SHARES},
            "break_even": break_even([cost[share] for share in SHARES]),
        }


def break_even(costs: Sequence[float]) -> float | None:
    """The first share whose cost is 1; costs: at SHARES."""
    points = list(zip(SHARES, costs, strict=True))
    for (share, cost), (next_share, next_cost) in pairwise(points):
        if cost <= 1 < next_cost:
            return share + (next_share - share) * (1 - cost) / (next_cost - cost)
    return None if costs[0] <= 1 else 0.0


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Cost against the whole picture at once, over the picture, for each share that asks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    tokens = [row["visual_tokens"] for row in rows]
    for share, colour in zip(SHARES, ("#2a6f97", "#61a5c2", "#e09f3e", "#c1666b"), strict=True):
        axes.plot(tokens, [row[f"cost_{share:g}"] for row in rows], "o-", color=colour, label=f"{share:.0%} ask")
    axes.axhline(1, color="0.5", linewidth=0.8)
    axes.set(xlabel="visual tokens of the whole picture", ylabel="time against the whole at once", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
