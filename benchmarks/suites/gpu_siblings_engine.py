"""What a decode step of the 7B model takes on one GPU whose 64 rows are siblings of one prompt or of eight.

Random weights (bfloat16), prompts of text. Once for all: the pages of the prompt are read once for up to eight rows
(`EngineConfig.share_prefix`). `--quick` runs a small model, also on the CPU.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator
from itertools import product
from typing import Any

from qwen_sizes import NoText, model_of, shape
from suites import siblings
from suites.gpu_steps import FEW_TOKENS, step_ms

from vtengine.engine.base import SamplingParams
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.engine.embedded.config import GPU_PAGE_SIZE
from vtengine.model import Qwen2_5_VL

TESTS = ["-m", "gpu", "tests/engine/embedded/test_attention_paths.py"]
ROWS, SIBLINGS, PREFIXES, NEW_TOKENS, ROUNDS = 64, (8, 64), (1024, 4096), 32, 2
TABLES = {"gpu-siblings-engine": {"columns": siblings.TABLES["siblings-engine"]["columns"]}}


def run(context: Any) -> Iterator[dict[str, Any]]:
    model = model_of(shape("7B", context.quick)[1])
    rows, groups, prefixes = (4, (2,), (64,)) if context.quick else (ROWS, SIBLINGS, PREFIXES)
    sides = {share: asyncio.run(_steps(model, share, rows, groups, prefixes)) for share in (False, True)}
    for n, prefix in product(groups, prefixes):
        plain, shared = (sides[share][n, prefix] for share in (False, True))
        row = {"rows": rows, "n": n, "prefix": prefix, "plain_ms": plain, "shared_ms": shared}
        yield row | {"speedup": plain / shared}


async def _steps(
    model: Qwen2_5_VL, share: bool, rows: int, groups: tuple[int, ...], prefixes: tuple[int, ...]
) -> dict[tuple[int, int], float]:
    """ms per step, by siblings and shared tokens; a first round is not counted."""
    pages = rows * (max(prefixes) // GPU_PAGE_SIZE // min(groups) + 8) + max(prefixes)
    config = EngineConfig(
        page_size=GPU_PAGE_SIZE, num_pages=pages, max_running=rows, max_batch_tokens=8192, share_prefix=share
    )
    engine = EmbeddedEngine(model, NoText(), config)
    found: dict[tuple[int, int], list[float]] = {case: [] for case in product(groups, prefixes)}
    try:
        for tokens in (FEW_TOKENS, *[NEW_TOKENS] * ROUNDS):
            for n, prefix in found:
                prompts = [tuple((31 * (row // n) + i + n) % 1000 for i in range(prefix)) for row in range(rows)]
                ms = await step_ms(engine, prompts, SamplingParams(max_new_tokens=tokens, temperature=1.0, seed=0))
                if tokens != FEW_TOKENS:
                    found[n, prefix].append(ms)
    finally:
        await engine.close()
    return {case: statistics.median(ms) for case, ms in found.items()}
