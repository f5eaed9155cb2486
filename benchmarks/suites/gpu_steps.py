"""What a decode step of the embedded engine takes on one GPU, with and without overlap and CUDA graphs.

Random weights (bfloat16) at the sizes of Qwen2.5-VL-7B; the rows of a batch start and end together. Engines without
overlap decode greedily, those without graphs one size of batch. `--quick` runs a small model, also on the CPU.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from typing import Any

from qwen_sizes import NoText, model_of, shape

from vtengine.engine.base import Request, SamplingParams
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.engine.embedded.config import GPU_PAGE_SIZE
from vtengine.model import Qwen2_5_VL

TESTS = ["-m", "gpu", "tests/engine/embedded/test_overlap.py"]
BATCHES, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = (1, 16, 64), 64, 32, 2
FEW_TOKENS = 4
"""Of the round that is not counted, in which kernels are compiled."""
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "temperature 1, top_p 0.95": {"temperature": 1.0, "top_p": 0.95},
}
TABLES = {
    "gpu-steps": {
        "columns": {
            "model": "Model",
            "rows": "Rows",
            "sampling": "Sampling",
            "graphs": "Graphs",
            "overlap": "Overlap",
            "ms": "ms per step",
        }
    }
}


def run(context: Any) -> Iterator[dict[str, Any]]:
    batches, new_tokens, rounds = (BATCHES[:1], 8, 1) if context.quick else (BATCHES, NEW_TOKENS, ROUNDS)
    middle = batches[len(batches) // 2]
    name, sizes = shape("7B", context.quick)
    model = model_of(sizes)
    for graphs, overlap in ((True, True), (True, False), (False, True), (False, False)):
        ways = WAYS if graphs and overlap else ("greedy",)
        kinds = [(rows, way) for rows in (batches if graphs else (middle,)) for way in ways]
        for (rows, way), ms in asyncio.run(_steps(model, graphs, overlap, kinds, new_tokens, rounds)).items():
            yield {
                "model": name,
                "rows": rows,
                "sampling": way,
                "graphs": "yes" if graphs else "no",
                "overlap": "yes" if overlap else "no",
                "ms": statistics.median(ms),
                "rounds": rounds,
            }


async def _steps(
    model: Qwen2_5_VL, graphs: bool, overlap: bool, kinds: list[tuple[int, str]], new_tokens: int, rounds: int
) -> dict[tuple[int, str], list[float]]:
    """ms per step of each round, by rows and way to sample; the rounds of all in turn."""
    most_rows = max(rows for rows, _ in kinds)
    config = EngineConfig(
        page_size=GPU_PAGE_SIZE, num_pages=most_rows * ((PROMPT_TOKENS + new_tokens) // GPU_PAGE_SIZE + 2),
        max_running=most_rows, max_batch_tokens=most_rows * PROMPT_TOKENS, resume=False, share_prefix=False,
        cuda_graphs=graphs, overlap=overlap,
    )  # fmt: skip
    engine = EmbeddedEngine(model, NoText(), config)
    found: dict[tuple[int, str], list[float]] = {kind: [] for kind in kinds}
    try:
        for tokens in (FEW_TOKENS, *[new_tokens] * rounds):
            for rows, way in found:
                prompts = [tuple((31 * row + i) % 1000 for i in range(PROMPT_TOKENS)) for row in range(rows)]
                ms = await step_ms(engine, prompts, SamplingParams(max_new_tokens=tokens, seed=0, **WAYS[way]))
                if tokens != FEW_TOKENS:
                    found[rows, way].append(ms)
    finally:
        await engine.close()
    return found


async def step_ms(engine: EmbeddedEngine, prompts: list[tuple[int, ...]], sampling: SamplingParams) -> float:
    """ms between two tokens of a row, on average, of as many at once as there are prompts."""
    told_s: list[float] = []
    requests = [Request(str(row), ids, sampling=sampling) for row, ids in enumerate(prompts)]
    last = engine.generate(requests[-1], lambda ids: told_s.append(time.perf_counter()))
    await asyncio.gather(*map(engine.generate, requests[:-1]), last)
    return 1e3 * (told_s[-1] - told_s[0]) / (len(told_s) - 1)
