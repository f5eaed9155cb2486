"""Decoding siblings that share a long prefix on the CPU: its pages read for each of them, or once for all.

`attention`: one layer's decode attention (float32, pages of 4 tokens, 64 tokens of each row's own). The caches of many
layers are gone through in turn, as a decode step does, so that a layer's keys come from memory. `engine`: the shipped
model's decode steps on groups of 16. Both sides give the same bits. `data`: from how many shared tokens on it pays.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import torch
from two_turn_run import held_out_questions, model_folder
from vtengine_kernels.prefix_attention import Crossover, Siblings, prefix_attention

from vtengine.engine.base import Request, SamplingParams
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.engine.embedded.config import PAGE_SIZE
from vtengine.model import Qwen2_5_VL, load_model
from vtengine.rollout.tokenizer import Tokenizer

TESTS = ["tests/kernels/test_prefix_attention.py", "tests/engine/embedded/test_families.py"]
SHAPES = {"glance": (4, 2, 64), "Qwen2.5-VL-3B": (16, 2, 128), "Qwen2.5-VL-7B": (28, 4, 128)}
GROUPS = (2, 4, 8, 16)
PREFIXES = (64, 128, 256, 512, 1024, 4096)
OWN, PAGE = 64, PAGE_SIZE
CACHES_MIB = 96
"""Of all layers together: more than a processor's last cache."""
MOST_LAYERS = 48
CROSSOVER = "kernels/vtengine_kernels/prefix_attention/crossover_cpu.json"
TABLES = {
    "siblings-attention": {
        "columns": {
            "shape": "Heads of",
            "n": "Siblings",
            "prefix": "Shared tokens",
            "plain_ms": "Each for itself, ms a layer",
            "shared_ms": "Once for all, ms a layer",
            "speedup": "Times as fast",
        },
        "where": {"part": "attention", "shown": True},
    },
    "siblings-engine": {
        "columns": {
            "n": "Siblings",
            "prefix": "Shared tokens",
            "plain_ms": "Each for itself, ms a step",
            "shared_ms": "Once for all, ms a step",
            "speedup": "Times as fast",
        },
        "where": {"part": "engine"},
    },
}


def run(context: Any) -> list[dict[str, Any]]:
    shapes = {"glance": SHAPES["glance"]} if context.quick else SHAPES
    groups, prefixes = ((4,), (64, 256)) if context.quick else (GROUPS, PREFIXES)
    torch.manual_seed(0)
    rows = [attention_row(context, name, n, prefix) for name in shapes for n in groups for prefix in prefixes]
    return rows + engine_rows(context)


def data(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The files of the product that hold what was found here (see `benchmarks/run.py`)."""
    return {CROSSOVER: crossover([row for row in rows if row["part"] == "attention"])}


def crossover(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """For each number of siblings the fewest shared tokens from which on sharing never lost, whatever the rest."""
    found: dict[str, list[int]] = {"siblings": [], "tokens": []}
    for n in sorted({row["n"] for row in rows}):
        lost = [row["prefix"] for row in rows if row["n"] == n and row["speedup"] < 1]
        won = [row["prefix"] for row in rows if row["n"] == n and row["prefix"] > max(lost, default=0)]
        if won:
            found["siblings"].append(n)
            found["tokens"].append(min(won))
    return found


def attention_row(context: Any, shape: str, n: int, prefix: int) -> dict[str, Any]:
    heads, kv_heads, size = SHAPES[shape]
    tables = tables_of(n, n, prefix, OWN, PAGE)
    num_pages = 1 + max(map(max, tables))
    layer = 2 * num_pages * PAGE * kv_heads * size * 4
    layers = min(MOST_LAYERS, -(-(CACHES_MIB << 20) // layer))
    caches = torch.randn(layers, 2, num_pages, PAGE, kv_heads, size)
    q, table, lengths = torch.randn(n, heads, size), torch.tensor(tables), torch.full((n,), prefix + OWN)

    def side(siblings: Siblings | None) -> Callable[[], torch.Tensor]:
        def all_layers() -> torch.Tensor:
            return torch.stack([prefix_attention(q, *cache, table, lengths, siblings) for cache in caches])

        return all_layers

    sides = {"plain": side(None), "shared": side(Siblings.of(tables, PAGE, Crossover()))}
    if not torch.equal(sides["plain"](), sides["shared"]()):
        raise RuntimeError(f"{shape}, {n} siblings of {prefix} tokens: the two sides differ")
    found = context.compare(sides, rounds=9, min_round_s=0.04)
    times = {f"{name}_ms": 1e3 * one.min_s / layers for name, one in found.items()}
    row = {"part": "attention", "shape": shape, "n": n, "prefix": prefix, "shown": n > 2 and prefix > 128, **times}
    return row | {"speedup": times["plain_ms"] / times["shared_ms"], "threads": torch.get_num_threads()}


def tables_of(batch: int, n: int, prefix: int, own: int, page: int) -> list[list[int]]:
    """The pages of each row, scattered as they are after a while: n after n share `prefix` tokens, `own` follow."""
    shared = prefix // page
    pages = iter(torch.randperm(-(-batch // n) * shared + batch * (own // page)).tolist())
    tables: list[list[int]] = []
    for row in range(batch):
        begin = tables[row - row % n][:shared] if row % n else [next(pages) for _ in range(shared)]
        tables.append(begin + [next(pages) for _ in range(own // page)])
    return tables


def engine_rows(context: Any) -> list[dict[str, Any]]:
    model = load_model(model_folder(), dtype=torch.float32)
    n, lengths = (4, (128,)) if context.quick else (16, (256, 1024))
    return [engine_row(context, model, n, prefix) for prefix in lengths]


def engine_row(context: Any, model: Qwen2_5_VL, n: int, prefix: int) -> dict[str, Any]:
    """Decode steps of n seeded samples of one prompt of `prefix` tokens; the prompt's own pass is not counted."""
    tokenizer = Tokenizer.load(model_folder())
    text = " ".join(asked.question.text for asked in held_out_questions(8))
    ids = tokenizer.encode_trusted(text)
    ids = (ids * (1 + prefix // len(ids)))[:prefix]
    steps = 8 if context.quick else 32
    seconds: dict[str, list[float]] = {"plain": [], "shared": []}
    for turn in range(1 if context.quick else 7):
        for name in sorted(seconds, reverse=bool(turn % 2)):
            seconds[name].append(asyncio.run(decoded(model, tokenizer, ids, n, steps, name == "shared")))
    times = {f"{name}_ms": 1e3 * min(found) for name, found in seconds.items()}
    return {"part": "engine", "n": n, "prefix": prefix, **times, "speedup": times["plain_ms"] / times["shared_ms"]}


async def decoded(model: Qwen2_5_VL, tokenizer: Tokenizer, ids: list[int], n: int, steps: int, share: bool) -> float:
    """Seconds of a decode step, the mean of many."""
    engine = EmbeddedEngine(model, tokenizer, EngineConfig(page_size=PAGE, num_pages=4096, share_prefix=share))
    try:

        def ask(k: int, count: int) -> Request:
            return Request(
                f"{k}-{count}", tuple(ids), (), SamplingParams(max_new_tokens=count, temperature=1.0, seed=k)
            )

        await engine.generate(ask(0, 1))
        begin = time.perf_counter()
        await asyncio.gather(*(engine.generate(ask(k, 1)) for k in range(n)))
        first = time.perf_counter()
        await asyncio.gather(*(engine.generate(ask(k, 1 + steps)) for k in range(n)))
        return (time.perf_counter() - first - (first - begin)) / steps
    finally:
        await engine.close()
