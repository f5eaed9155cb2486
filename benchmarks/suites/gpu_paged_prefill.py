"""The second turn's prefill on a GPU: rows of many new tokens over the cached pages of their first turn.

One layer's attention in bfloat16, 28 query and 4 key heads of 128 (Qwen2.5-VL-7B), pages of 16 tokens in any order.
`gathered` copies keys and values out of the pages and leaves the rest to torch's variable-length flash kernel; ours,
flash-attn 3 and FlashInfer (where they are installed) read them in place. Several layers in turn, in a CUDA graph (see
`on_gpu`) but for FlashInfer.
`tflops`: 4 * Hq * D operations for each pair of a query and a token that it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from suites.gpu_siblings import HEADS, INSTALLED, PAGE, SIZE, caches_of, microseconds, numbers
from torch import Tensor
from vtengine_kernels.paged_prefill import paged_prefill
from vtengine_kernels.shared_prefix_attention import flash

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


def run(context: Any) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    pool = numbers()
    for case in CASES[:1] if context.quick else CASES:
        yield measured(context, pool, *case)


def measured(context: Any, pool: Tensor, rows: int, new: int, cached: int) -> dict[str, Any]:
    length = cached + new
    width = -(-length // PAGE)
    caches = caches_of(pool, rows * width)
    q = torch.randn(rows * new, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
    tables = torch.randperm(rows * width, device="cuda").view(rows, width)
    lengths = torch.full((rows,), length, device="cuda")
    offsets = torch.arange(rows + 1, device="cuda") * new

    def in_place(impl: Any) -> Callable[[], object]:
        return lambda: [paged_prefill(q, *cache, tables, lengths, offsets, new, impl=impl) for cache in caches]

    slots = (tables[:, :, None] * PAGE + torch.arange(PAGE, device="cuda")).flatten(1)[:, :length].flatten()
    starts = [(torch.arange(rows + 1, device="cuda") * each).int() for each in (new, length)]
    sides = {"triton": in_place("triton")}
    sides["gathered"] = lambda: [gathered(q, *cache, slots, starts, new, length) for cache in caches]
    sides |= {name: in_place(name) for name, adapter in INSTALLED.items() if adapter.missing() is None}
    times = microseconds(context, sides, len(caches), 1)
    pairs = rows * (new * cached + new * (new + 1) // 2)
    row = {"rows": rows, "new": new, "cached": cached, "flash_us": None, "flashinfer_us": None, **times}
    row["tflops"] = 4 * HEADS * SIZE * pairs / times["triton_us"] / 1e6
    return row | {"speedup": times["gathered_us"] / times["triton_us"]}


def gathered(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, starts: list[Tensor], new: int, length: int
) -> Tensor:
    """Rows of equal length [rows * new, Hq, D]; causal, the last query seeing all. starts: of queries and of keys."""
    k, v = (x.flatten(0, 1).index_select(0, slots) for x in (keys, values))
    return flash.attend(q, k, v, *starts, new, length, True)[0]
