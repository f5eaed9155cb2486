"""Two turns at the sizes of Qwen2.5-VL-7B on one GPU, resumed and not, and decode attention against flash-attn.

Random weights (bfloat16) and made-up pixels: what is measured is the engine's work. Each of the pictures is asked about
by 8 siblings: turn 1 shows 1,024 visual tokens, turn 2 appends 4,096. `--quick` runs a small model, also on the CPU.
"""

from __future__ import annotations

import asyncio
import importlib.util
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from on_gpu import captured, layers_of
from qwen_sizes import PAD, NoText, model_of, shape, view_of
from vtengine_kernels.prefix_attention import prefix_attention

from vtengine.engine.base import Completion, ImageInput, Request, SamplingParams
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.engine.embedded.config import GPU_PAGE_SIZE
from vtengine.model import Qwen2_5_VL

TESTS = ["-m", "gpu", "tests/engine/embedded/test_attention_paths.py"]
PICTURES, SIBLINGS, ROUNDS = 2, 8, 2
LOW_SIDE, HIGH_SIDE = 64, 128  # patches: 1,024 and 4,096 visual tokens
TEXT_TOKENS, NEW_TOKENS = 64, 32
BATCHES, LENGTHS = (8, 64, 256), (1024, 4096)
REPEATS = 4
TABLES = {
    "gpu-two-turn": {
        "columns": {
            "model": "Model",
            "resumption": "Resumption",
            "episodes_per_s": "Episodes/s",
            "ttft_turn2_ms": "First token of turn 2, ms",
            "prefill_tokens": "Tokens prefilled",
            "images_encoded": "Images encoded",
        },
        "where": {"part": "two_turn"},
    },
    "gpu-decode-attention": {
        "columns": {"batch": "Batch", "length": "Context", "impl": "Kernel", "us": "µs"},
        "where": {"part": "decode"},
    },
}


def run(context: Any) -> Iterator[dict[str, Any]]:
    name, sizes = shape("7B", context.quick)
    yield from _two_turn(name, model_of(sizes), context.quick)
    if torch.cuda.is_available():
        yield from _decode(context)


def _two_turn(name: str, model: Qwen2_5_VL, quick: bool) -> Iterator[dict[str, Any]]:
    rounds, siblings = (1, 2) if quick else (ROUNDS, SIBLINGS)
    sides = (8, 16) if quick else (LOW_SIDE, HIGH_SIDE)
    for resume in (True, False):
        runs = asyncio.run(_rounds(model, resume, rounds, siblings, sides))
        later = [second.ttft_s for _, episodes in runs for _, second in episodes]
        last = [turn for episode in runs[-1][1] for turn in episode]
        yield {
            "part": "two_turn",
            "model": name,
            "resumption": "on" if resume else "off",
            "episodes": PICTURES * siblings,
            "rounds": rounds,
            "episodes_per_s": PICTURES * siblings / statistics.median(wall_s for wall_s, _ in runs),
            "ttft_turn2_ms": 1e3 * statistics.median(later),
            "prompt_tokens": sum(turn.prompt_tokens for turn in last),
            "prefill_tokens": sum(turn.prefill_tokens for turn in last),
            "images_encoded": sum(sum(turn.images_encoded) for turn in last),
        }


async def _rounds(
    model: Qwen2_5_VL, resume: bool, rounds: int, siblings: int, sides: tuple[int, int]
) -> list[tuple[float, list[tuple[Completion, Completion]]]]:
    """(seconds, both turns of every episode) of each round, which all show other pictures.

    One engine does them all, after a round of a sibling each that is not counted: it compiles the kernels of prefill.
    """
    tokens = sum(side**2 // 4 for side in sides) + 2 * (TEXT_TOKENS + NEW_TOKENS)
    pages = PICTURES * siblings * (tokens // GPU_PAGE_SIZE + 2)
    config = EngineConfig(
        page_size=GPU_PAGE_SIZE, num_pages=pages, max_running=PICTURES * siblings, max_batch_tokens=8192, resume=resume
    )
    engine = EmbeddedEngine(model, NoText(), config)
    runs = []
    try:
        for number in range(rounds + 1):
            pictures, asked = range(number * PICTURES, (number + 1) * PICTURES), siblings if number else 1
            views = {picture: [view_of(picture, side, model.dtype) for side in sides] for picture in pictures}
            started_s = time.perf_counter()
            done = await asyncio.gather(
                *(_episode(engine, picture, s, views[picture]) for picture in pictures for s in range(asked))
            )
            runs.append((time.perf_counter() - started_s, list(done)))
    finally:
        await engine.close()
    return runs[1:]


async def _episode(
    engine: EmbeddedEngine, picture: int, sibling: int, images: list[ImageInput]
) -> tuple[Completion, Completion]:
    text = [(31 * picture + index) % 1000 for index in range(TEXT_TOKENS)]
    ids = [*text, *[PAD] * images[0].visual_tokens]
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0, seed=sibling)
    first = await engine.generate(Request(f"{picture}.{sibling}/0", tuple(ids), tuple(images[:1]), sampling))
    ids += [*first.token_ids, *[PAD] * images[1].visual_tokens, *text]
    second = await engine.generate(Request(f"{picture}.{sibling}/1", tuple(ids), tuple(images), sampling))
    return first, second


def _decode(context: Any) -> Iterator[dict[str, Any]]:
    """One query per row, 28:4 heads of 128: our kernel on pages of 16, flash-attn, if installed, on pages of 256.

    Several layers in turn, in a CUDA graph, as in the engine's decode steps (see `on_gpu`).
    """
    for length in LENGTHS[:1] if context.quick else LENGTHS:
        layers = {batch: layers_of(2 * 2 * batch * length * 4 * 128) for batch in BATCHES}
        for batch in BATCHES[:2] if context.quick else BATCHES:
            sides = {"vtengine": _ours(batch, length, layers[batch])}
            if importlib.util.find_spec("flash_attn") is not None:
                sides["flash-attn"] = _flash(batch, length, layers[batch])
            calls = {name: captured(side, REPEATS) for name, side in sides.items()}
            timed = context.compare(calls, rounds=5, min_round_s=0.01, warmup=3, after=torch.cuda.synchronize)
            for name, measured in timed.items():
                row = {"part": "decode", "batch": batch, "length": length, "impl": name}
                yield {**row, "us": 1e6 * measured.median_s / (layers[batch] * REPEATS)}


def _paged(batch: int, length: int, page: int, layers: int) -> tuple[Any, ...]:
    """(q, [(keys, values) of each layer], tables, lengths) on the GPU."""
    per_row = length // page
    q = torch.randn(batch, 28, 128, device="cuda", dtype=torch.bfloat16)
    caches = torch.randn(layers, 2, batch * per_row, page, 4, 128, device="cuda", dtype=q.dtype)
    tables = torch.randperm(batch * per_row, device="cuda").view(batch, per_row)
    return q, [tuple(cache) for cache in caches], tables, torch.full((batch,), length, device="cuda")


def _ours(batch: int, length: int, layers: int) -> Any:
    q, caches, *rest = _paged(batch, length, GPU_PAGE_SIZE, layers)
    return lambda: [prefix_attention(q, *cache, *rest, impl="triton") for cache in caches]


def _flash(batch: int, length: int, layers: int) -> Any:
    from flash_attn import flash_attn_with_kvcache

    q, caches, tables, lengths = _paged(batch, length, 256, layers)
    kinds = {"cache_seqlens": lengths.int(), "block_table": tables.int(), "causal": True}
    return lambda: [flash_attn_with_kvcache(q.unsqueeze(1), *cache, **kinds) for cache in caches]
