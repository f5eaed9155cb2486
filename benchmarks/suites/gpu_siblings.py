"""Decoding siblings that share a long prefix on a GPU: its pages read for each of them, or once for up to eight.

One layer's decode attention in bfloat16, 28 query and 4 key heads of 128 (Qwen2.5-VL-7B), pages of 16 tokens, 256
tokens of each row's own, in batches of groups. `plain` is our kernel for single rows, `alone` the split kernel that is
told of no siblings, `split` the same with siblings; flash-attn 3 and FlashInfer where they are installed. The caches of
several layers are gone through in turn, in a CUDA graph as in the engine (see `on_gpu`), but for FlashInfer, which the
engine does not capture either.
`data`: from how many shared tokens on split is faster than plain, all batches together: with whom a row shares may not
depend on how many others there are, or its result would.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from on_gpu import captured, layers_of, repeat
from suites.siblings import SHAPES, crossover, tables_of
from torch import Tensor
from vtengine_kernels import flash_attn3, flashinfer_paged
from vtengine_kernels.prefix_attention import Crossover, Siblings, prefix_attention

from vtengine.engine.embedded.config import GPU_PAGE_SIZE

TESTS = ["-m", "gpu", "tests/kernels/test_prefix_attention_triton.py", "tests/kernels/test_installed_attention.py"]
HEADS, KV_HEADS, SIZE = SHAPES["Qwen2.5-VL-7B"]
OWN, PAGE = 256, GPU_PAGE_SIZE
BATCHES, GROUPS, PREFIXES = (8, 32, 128, 256), (8, 16), (256, 1024, 4096)
CROSSOVER = "kernels/vtengine_kernels/prefix_attention/crossover_triton.json"
REPEATS = 4  # of all layers, so that little of the time is that of one launch
POOL_NUMBERS = 1 << 30
"""Random numbers that all caches are cut out of."""
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


def run(context: Any) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    pool = numbers()
    batches, prefixes = (BATCHES[:1], PREFIXES[:2]) if context.quick else (BATCHES, PREFIXES)
    for batch, n, prefix in product(batches, GROUPS, prefixes):
        if batch >= n:
            yield measured(context, pool, batch, n, prefix)


def data(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """As `siblings` has it for the CPU."""
    times_us: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for row in rows:
        times_us[row["n"], row["prefix"]].update({side: row[side] for side in ("plain_us", "split_us")})
    together = [
        {"n": n, "prefix": prefix, "speedup": us["plain_us"] / us["split_us"]} for (n, prefix), us in times_us.items()
    ]
    return {CROSSOVER: crossover(together)}


def measured(context: Any, pool: Tensor, batch: int, n: int, prefix: int) -> dict[str, Any]:
    tables = tables_of(batch, n, prefix, OWN, PAGE)
    caches = caches_of(pool, 1 + max(map(max, tables)))
    q = torch.randn(batch, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
    lengths = np.full(batch, prefix + OWN)
    rest = (torch.tensor(tables, device="cuda"), torch.from_numpy(lengths).cuda())
    siblings = Siblings.of(tables, PAGE, Crossover())
    assert siblings is not None  # the smallest prefix is shared too
    told = {"alone": Siblings.strangers(batch), "split": siblings}

    def side(impl: str, known: Siblings | None = None) -> Callable[[], object]:
        return lambda: [prefix_attention(q, *cache, *rest, known, impl=impl) for cache in caches]

    sides = {"plain": side("triton")}
    sides |= {name: side("triton", known.with_work(lengths, q.device)) for name, known in told.items()}
    sides |= {name: side(name) for name, adapter in INSTALLED.items() if adapter.missing() is None}
    times = microseconds(context, sides, len(caches), REPEATS)
    row = {"batch": batch, "n": n, "prefix": prefix, "flash_us": None, "flashinfer_us": None, **times}
    return row | {"speedup": times["plain_us"] / times["split_us"]}


def numbers() -> Tensor:
    return torch.randn(POOL_NUMBERS, device="cuda", dtype=torch.bfloat16)


def caches_of(pool: Tensor, num_pages: int) -> list[list[Tensor]]:
    """[keys, values] of several layers."""
    shape = (2, num_pages, PAGE, KV_HEADS, SIZE)
    layers = layers_of(2 * math.prod(shape))
    return [list(layer) for layer in pool[: layers * math.prod(shape)].view(layers, *shape)]


def microseconds(context: Any, sides: dict[str, Callable[[], object]], layers: int, repeats: int) -> dict[str, float]:
    """NAME_us of a layer. sides: by name, what goes through all layers once; captured, unless it is FlashInfer's."""
    calls = {
        name: partial(repeat, side, repeats) if name == "flashinfer" else captured(side, repeats)
        for name, side in sides.items()
    }
    found = context.compare(calls, rounds=5, min_round_s=0.005, warmup=3, after=torch.cuda.synchronize)
    return {f"{name}_us": 1e6 * one.median_s / (layers * repeats) for name, one in found.items()}
