"""token_sample on a GPU, a vocabulary of 152,064: Triton in a CUDA graph beside torch, which sorts with a truncation.

Scores and ways as in `token_sample`. `floor_us`: the scores read once, with a truncation twice, at the rate of a copy
measured in the same run. The scores of one row stay in the second-level cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from on_gpu import captured
from suites.gpu_patchify import copy_rate
from suites.token_sample import scores_of, ways_of
from vtengine_kernels.token_sample import token_sample

TESTS = ["-m", "gpu", "tests/kernels/test_token_sample.py", "tests/kernels/test_token_truncation.py"]
ROWS, REPEATS = (1, 16, 64), 10
TABLES = {
    "gpu-token-sample": {
        "columns": {
            "rows": "Rows",
            "scores": "Scores",
            "way": "Sampling",
            "us": "Triton, µs",
            "torch_us": "torch, µs",
            "floor_us": "Floor, µs",
            "speedup": "Times as fast",
        }
    }
}


def run(context: Any) -> Iterator[dict[str, Any]]:
    rate = copy_rate(context)
    generator = torch.Generator("cuda").manual_seed(0)
    for rows, kind in itertools.product(ROWS[:1] if context.quick else ROWS, ("peaked", "flat")):
        scores = scores_of(rows, kind, generator)
        for way, given in ways_of(rows, generator).items():
            calls = {
                "ours": captured(partial(token_sample, scores, *given, impl="triton"), REPEATS),
                "torch": partial(token_sample, scores, *given, impl="torch"),
            }
            times = context.compare(calls, rounds=5, after=torch.cuda.synchronize)
            ours, theirs = times["ours"].median_s / REPEATS, times["torch"].median_s
            yield {
                "rows": rows,
                "scores": kind,
                "way": way,
                "us": 1e6 * ours,
                "torch_us": 1e6 * theirs,
                "floor_us": 1e6 * scores.nbytes * min(2, max(1, len(given) - 1)) / rate,
                "speedup": theirs / ours,
            }
