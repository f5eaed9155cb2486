"""token_sample on one core of a CPU, a vocabulary of 152,064: C++ beside torch, which sorts with a truncation.

`peaked`: normal scores of deviation 2.5 and one id 14 above its own, so that top-k and min-p keep few ids and top-p
thousands; `flat`: of deviation 1, where top-p keeps most ids.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from vtengine_kernels.token_sample import Truncation, token_sample

TESTS = ["tests/kernels/test_token_sample.py", "tests/kernels/test_token_truncation.py"]
VOCABULARY = 152_064
LIMITS = {
    "top-k 50, top-p 0.9": (50, 0.9, 0.0),
    "top-p 0.9": (VOCABULARY, 0.9, 0.0),
    "min-p 0.05": (VOCABULARY, 1.0, 0.05),
}
TABLES = {
    "token-sample": {
        "columns": {
            "rows": "Rows",
            "scores": "Scores",
            "way": "Sampling",
            "ms": "C++, ms",
            "torch_ms": "torch, ms",
            "speedup": "Times as fast",
        }
    }
}


def run(context: Any) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    found = []
    for rows, kind in itertools.product((2,) if context.quick else (8, 64), ("peaked", "flat")):
        scores = scores_of(rows, kind, generator)
        for way, given in ways_of(rows, generator).items():
            calls = {impl: functools.partial(token_sample, scores, *given, impl=impl) for impl in ("cpu", "torch")}
            times = context.compare(calls, rounds=5)
            ours, theirs = times["cpu"].median_s, times["torch"].median_s
            found.append(
                {
                    "rows": rows,
                    "scores": kind,
                    "way": way,
                    "ms": 1e3 * ours,
                    "torch_ms": 1e3 * theirs,
                    "speedup": theirs / ours,
                }
            )
    return found


def scores_of(rows: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    """float32 [rows, VOCABULARY] on the generator's device."""
    device = generator.device
    scores = torch.randn(rows, VOCABULARY, generator=generator, device=device)
    if kind == "peaked":
        scores *= 2.5
        best = torch.randint(VOCABULARY, (rows,), generator=generator, device=device)
        scores[torch.arange(rows, device=device), best] += 14
    return scores


def ways_of(rows: int, generator: torch.Generator) -> dict[str, tuple[Any, ...]]:
    """What token_sample is given behind the scores, by the way to sample."""
    device = generator.device
    draws = torch.rand(rows, dtype=torch.float64, generator=generator, device=device), torch.ones(rows, device=device)
    ways: dict[str, tuple[Any, ...]] = {"greedy": (), "a draw": draws}
    for name, limits in LIMITS.items():
        ways[name] = (*draws, Truncation(*(torch.full((rows,), limit, device=device) for limit in limits)))
    return ways
