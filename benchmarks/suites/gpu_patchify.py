"""patchify on a GPU: bytes to bfloat16 compact patches, against the time that a copy of as many bytes takes.

"kernels": the image is on the GPU and the launches are replayed from a CUDA graph, which leaves the kernels; "GPU":
the same as ordinary calls; "main memory": with the upload. The floor is that of the bytes of image and rows at the copy
rate measured in the same run; `floor_4_3_us` at 4.3 TB/s, an H200's. The CPU's own patchify with the upload of its rows
stands beside it. Every result is compared with the CPU's, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from on_gpu import captured, repeat
from vtengine_kernels.patchify import Step, Target, patchify

from vtengine.vision.plan import PixelLimits, plan_high, plan_low, plan_low_half_first

TESTS = ["-m", "gpu", "tests/kernels/test_patchify_triton.py"]
SIZES = [(512, 512), (1024, 768), (2048, 1024), (4096, 3072)]
CALLS = {"kernels": 50, "GPU": 20, "main memory": 5, "CPU": 1}  # per timing: one launch would include its way there
ROUNDS = 5
TABLES = {
    "patchify-gpu": {
        "columns": {
            "image": "Image",
            "views": "Views",
            "source": "From",
            "us": "us",
            "floor_us": "Copy of as many bytes, us",
            "floor_ratio": "x copy",
            "floor_4_3_us": "at 4.3 TB/s, us",
            "cpu_us": "CPU, 1 thread, and upload, us",
        }
    }
}


def run(context: Any) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rate = copy_rate(context)
    for width, height in SIZES[:1] if context.quick else SIZES:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for views, targets in targets_of(width, height).items():
            yield from measured(context, image, views, targets, rate)


def targets_of(width: int, height: int) -> dict[str, list[Target]]:
    """Names of views and what makes them."""
    high, half = plan_high(width, height, PixelLimits()), plan_low_half_first(width, height, PixelLimits())
    assert half.half is not None
    low = plan_low(high)
    views = [Target(plan.height, plan.width) for plan in (low, high)]
    twice = Target(half.height, half.width, before=(Step(*half.half),))
    return {"high": views[1:], "low": views[:1], "low and high": views, "low, half first": [twice]}


def measured(context: Any, image: np.ndarray, views: str, targets: list[Target], rate: float) -> list[dict[str, Any]]:
    """One row for each place that the image comes from. RuntimeError: a value differs from the CPU's."""
    options = {"dtype": torch.bfloat16, "layout": "compact"}
    on_cpu, on_gpu = torch.from_numpy(image), torch.from_numpy(image).cuda()
    want = patchify(image, targets, **options)
    got = patchify(on_gpu, targets, **options)
    if not all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(got, want, strict=True)):
        raise RuntimeError(f"{views} of {image.shape}: the GPU's values differ from the CPU's")
    outs = [rows.clone() for rows in got]
    from_gpu = partial(patchify, on_gpu, targets, out=outs, **options)
    from_main = partial(patchify, on_cpu, targets, device="cuda", out=outs, **options)
    calls = {
        "kernels": captured(from_gpu, CALLS["kernels"]),
        "GPU": partial(repeat, from_gpu, CALLS["GPU"]),
        "main memory": partial(repeat, from_main, CALLS["main memory"]),
        "CPU": lambda: [rows.cuda() for rows in patchify(image, targets, **options)],
    }
    times = context.compare(calls, rounds=ROUNDS, after=torch.cuda.synchronize)
    each_s = {source: times[source].min_s / count for source, count in CALLS.items()}
    moved = image.nbytes + sum(rows.nbytes for rows in outs)
    return [
        {
            "image": f"{image.shape[1]}x{image.shape[0]}",
            "views": views,
            "source": source,
            "us": 1e6 * each_s[source],
            "floor_us": 1e6 * moved / rate,
            "floor_ratio": each_s[source] / (moved / rate),
            "floor_4_3_us": 1e6 * moved / 4.3e12,
            "cpu_us": 1e6 * each_s["CPU"],
        }
        for source in ("kernels", "GPU", "main memory")
    ]


def copy_rate(context: Any) -> float:
    """Bytes read and written per second by a copy of 256 MiB on the device."""
    source = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(source)
    copies = {"copy": partial(repeat, lambda: to.copy_(source), CALLS["kernels"])}
    time = context.compare(copies, rounds=ROUNDS, after=torch.cuda.synchronize)["copy"]
    return 2 * CALLS["kernels"] * source.nbytes / time.min_s
