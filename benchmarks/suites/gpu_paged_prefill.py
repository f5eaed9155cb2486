"""The second turn's prefill on a GPU: rows of many new tokens over the cached pages of their first turn.

One layer's attention in bfloat16, 28 query and 4 key heads of 128 (Qwen2.5-VL-7B), pages of 16 tokens in any order.
`gathered` copies keys and values out of the pages and leaves the rest to torch's scaled_dot_product_attention; ours,
flash-attn 3 and FlashInfer (where they are installed) read them in place.
`tflops`: 4 * Hq * D operations for each pair of a query and a token that it sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from suites.gpu_siblings import HEADS, INSTALLED, KV_HEADS, SIZE
from suites.siblings import PAGE
from torch import Tensor
from torch.nn import functional as F
from vtengine_kernels.paged_prefill import paged_prefill

TESTS = ["-m", "gpu", "tests/kernels/test_paged_cache_triton.py", "tests/kernels/test_installed_attention.py"]
CASES = ((1, 1100, 420), (16, 1100, 420), (1, 4200, 1200), (16, 4200, 1200), (64, 300, 200))
"""(rows, new tokens, cached tokens): turn 2 at about 1k and 4k visual tokens, and short rows."""
TABLES = {
    "gpu-paged-prefill": {
        "columns": {
            "rows": "Rows",
            "new": "New tokens",
            "cached": "Cached tokens",
            "triton_us": "Ours, µs",
            "tflops": "Ours, TFLOP/s",
            "gathered_us": "Gathered pages, µs",
            "flash_us": "flash-attn 3, µs",
            "flashinfer_us": "FlashInfer, µs",
            "speedup": "Times as fast as gathered",
        },
    },
}


def run(context: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [measured(context, *case) for case in (CASES[:1] if context.quick else CASES)]


def measured(context: Any, rows: int, new: int, cached: int) -> dict[str, Any]:
    length = cached + new
    width = -(-length // PAGE)
    shape = (rows * width, PAGE, KV_HEADS, SIZE)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(rows * new, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
    tables = torch.randperm(rows * width, device="cuda").view(rows, width)
    lengths = torch.full((rows,), length, device="cuda")
    offsets = torch.arange(rows + 1, device="cuda") * new

    def in_place(impl: Any) -> Callable[[], object]:
        return lambda: paged_prefill(q, keys, values, tables, lengths, offsets, new, impl=impl)

    mask = torch.arange(length, device="cuda") <= torch.arange(cached, length, device="cuda")[:, None]
    sides = {"triton": in_place("triton"), "gathered": lambda: gathered(q, keys, values, tables, length, mask)}
    sides |= {name: in_place(name) for name, adapter in INSTALLED.items() if adapter.missing() is None}
    found = context.compare(sides, rounds=9, min_round_s=0.01, warmup=3, after=torch.cuda.synchronize)
    times = {f"{name}_us": 1e6 * one.median_s for name, one in found.items()}
    pairs = rows * (new * cached + new * (new + 1) // 2)
    row = {"rows": rows, "new": new, "cached": cached, "flash_us": None, "flashinfer_us": None, **times}
    row["tflops"] = 4 * HEADS * SIZE * pairs / times["triton_us"] / 1e6
    return row | {"speedup": times["gathered_us"] / times["triton_us"]}


def gathered(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, length: int, mask: Tensor) -> Tensor:
    """Rows of equal length [rows * new, Hq, D], by what torch has."""
    k, v = (
        x[tables.flatten()].view(len(tables), -1, KV_HEADS, SIZE)[:, :length].transpose(1, 2) for x in (keys, values)
    )
    rows = q.view(len(tables), -1, HEADS, SIZE).transpose(1, 2)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, enable_gqa=True)
