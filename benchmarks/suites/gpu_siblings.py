"""Decoding siblings that share a long prefix on a GPU: its pages read for each of them, or once for up to eight.

One layer's decode attention in bfloat16, 28 query and 4 key heads of 128 (Qwen2.5-VL-7B), pages of 16 tokens, 256
tokens of each row's own, in batches of groups. `plain` is our kernel for single rows, `alone` the split kernel that is
told of no siblings, `split` the same with siblings; flash-attn 3 and FlashInfer where they are installed.
`data`: from how many shared tokens on split is faster than plain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from suites.siblings import PAGE, SHAPES, crossover, tables_of
from vtengine_kernels import flash_attn3, flashinfer_paged
from vtengine_kernels.prefix_attention import Crossover, Siblings, prefix_attention

TESTS = ["-m", "gpu", "tests/kernels/test_prefix_attention_triton.py", "tests/kernels/test_installed_attention.py"]
HEADS, KV_HEADS, SIZE = SHAPES["Qwen2.5-VL-7B"]
OWN = 256
BATCHES, GROUPS, PREFIXES = (8, 32, 64, 128, 256), (8, 16), (256, 1024, 4096)
CROSSOVER = "kernels/vtengine_kernels/prefix_attention/crossover_triton.json"
INSTALLED = {"flash": flash_attn3, "flashinfer": flashinfer_paged}
TABLES = {
    "gpu-siblings": {
        "columns": {
            "batch": "Rows",
            "n": "Siblings",
            "prefix": "Shared tokens",
            "plain_us": "Plain, µs",
            "alone_us": "Split, told of none, µs",
            "split_us": "Split, µs",
            "flash_us": "flash-attn 3, µs",
            "flashinfer_us": "FlashInfer, µs",
            "speedup": "Split against plain",
        },
    },
}


def run(context: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    batches, prefixes = (BATCHES[:1], PREFIXES[:2]) if context.quick else (BATCHES, PREFIXES)
    cases = [(batch, n, prefix) for batch in batches for n in GROUPS for prefix in prefixes if batch >= n]
    return [measured(context, *case) for case in cases]


def data(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """As `siblings` has it for the CPU."""
    return {CROSSOVER: crossover(rows)}


def measured(context: Any, batch: int, n: int, prefix: int) -> dict[str, Any]:
    tables = tables_of(batch, n, prefix, OWN)
    num_pages = 1 + max(map(max, tables))
    keys, values = (torch.randn(num_pages, PAGE, KV_HEADS, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(batch, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
    lengths = np.full(batch, prefix + OWN)
    rest = (torch.tensor(tables, device="cuda"), torch.from_numpy(lengths).cuda())
    siblings = Siblings.of(tables, PAGE, Crossover())
    assert siblings is not None  # the smallest prefix is shared too
    told = {"alone": Siblings.strangers(batch), "split": siblings}

    def side(impl: str, known: Siblings | None = None) -> Callable[[], object]:
        return lambda: prefix_attention(q, keys, values, *rest, known, impl=impl)

    sides = {"plain": side("triton")}
    sides |= {name: side("triton", known.with_work(lengths, q.device)) for name, known in told.items()}
    sides |= {name: side(name) for name, adapter in INSTALLED.items() if adapter.missing() is None}
    found = context.compare(sides, rounds=9, min_round_s=0.01, warmup=3, after=torch.cuda.synchronize)
    times = {f"{name}_us": 1e6 * one.median_s for name, one in found.items()}
    row = {"batch": batch, "n": n, "prefix": prefix, "flash_us": None, "flashinfer_us": None, **times}
    return row | {"speedup": times["plain_us"] / times["split_us"]}
