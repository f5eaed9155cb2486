"""patchify against what people use: transformers, hf-processors-rs, torchvision's resize, Pillow, OpenCV.

Every candidate makes the full float32 rows of one view from the same uint8 image: "high" is one bicubic resize to the
grid, "quarter" VisionThink's low view, half by Lanczos and then bicubic. `levels_off` is the largest difference from
Pillow's resize in 8-bit levels (0 = exact). The floor is a memory copy that reads and writes as many bytes as image and
rows have together, with the same number of threads. vtengine's outputs come from its buffer pool, except in the row
"fresh memory". Times are the least over the rounds, `cpu_ms` and `median_ms` are medians. Rows with `part` = "ours"
compare vtengine with itself: views together and apart, forms of the output, threads. Rows with `part` = "aims" hold
what was set out to reach beside what was reached. `make bench-peers` runs the suite where the peers are installed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from patchify_peers import BACKENDS, peers
from PIL import Image
from vtengine_kernels import buffers, library
from vtengine_kernels.patchify import CLIP_STD, Step, Target, patchify

from vtengine.vision.plan import PixelLimits, plan_high, plan_low, plan_low_half_first

TESTS = [f"tests/kernels/test_patchify_{part}.py" for part in ("levels", "values", "targets", "bad_input")]
SIZES = [(512, 512), (1024, 768), (2048, 1024), (4096, 3072)]
COMPOSED = "torchvision's resize + torch"
AIMS_2_THREADS = {"high": (3, 4, 10, 15), "quarter": (6, 8, 12, 18)}  # times transformers' default, by size
_COLUMNS = {
    "image": "Image",
    "candidate": "Implementation",
    "threads": "Threads",
    "ms": "ms",
    "cpu_ms": "CPU ms",
    "gb_s": "GB/s",
    "floor_ratio": "x memory copy",
    "vtengine_faster": "vtengine is faster by",
    "levels_off": "Levels off Pillow",
}
TABLES = {
    "patchify-high": {"columns": _COLUMNS, "where": {"part": "peers", "view": "high"}},
    "patchify-quarter": {"columns": _COLUMNS, "where": {"part": "peers", "view": "quarter"}},
    "patchify-ours": {
        "columns": {
            "image": "Image",
            "candidate": "Variant",
            "threads": "Threads",
            "ms": "ms",
            "cpu_ms": "CPU ms",
            "relative": "ratio",
            "to": "to",
        },
        "where": {"part": "ours"},
    },
    "patchify-aims": {
        "columns": {"image": "Image", "candidate": "Aim", "wanted": "Wanted", "got": "Measured", "met": "Met"},
        "where": {"part": "aims"},
    },
}


def run(context: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for width, height in SIZES[:2] if context.quick else SIZES:
        image = smooth(rng, height, width)
        high, quarter = plan_high(width, height, PixelLimits()), plan_low_half_first(width, height, PixelLimits())
        assert quarter.half is not None
        views = {
            "high": Target(high.height, high.width),
            "quarter": Target(quarter.height, quarter.width, before=(Step(*quarter.half),)),
        }
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for view, target in views.items():
                rows += compared(context, image, view, target, threads)
        low = plan_low(high)
        rows += ours(context, image, Target(low.height, low.width), views["high"])
    torch.set_num_threads(1)
    rows += batch(context, rng)
    return rows + aims(rows)


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture-like image: soft shapes with some noise."""
    small = Image.fromarray(rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8))
    large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return np.clip(large + rng.integers(-8, 9, large.shape), 0, 255).astype(np.uint8)


def compared(context: Any, image: np.ndarray, view: str, target: Target, threads: int) -> list[dict[str, Any]]:
    """One row per candidate for one view."""
    out = torch.zeros(target.rows(14), 1176)
    moved = image.nbytes + out.nbytes
    call = partial(patchify, image, [target], num_threads=threads)
    candidates: dict[str, Callable[[], Any]] = {
        "vtengine": lambda: call()[0],
        "vtengine, torchvision's arithmetic": lambda: call(mode="tv")[0],
        "vtengine, fresh memory": lambda: buffers.outputs.release() or call()[0],
        **peers(image, [*target.before, Step(target.height, target.width, "bicubic")], out),
        "memory copy": memory_copy(moved, threads),
    }
    exact = patchify(image, [target], impl="ref")[0]
    levels = {name: levels_off(made, exact) for name, made in candidates.items() if name != "memory copy"}
    times = context.compare(candidates, rounds=7, min_round_s=0.02)
    floor, best = times["memory copy"].min_s, times["vtengine"].min_s
    return [
        {
            "part": "peers",
            "image": f"{image.shape[1]}x{image.shape[0]}",
            "view": view,
            "candidate": name,
            "threads": threads,
            "ms": 1e3 * time.min_s,
            "median_ms": 1e3 * time.median_s,
            "cpu_ms": 1e3 * time.cpu_s,
            "gb_s": moved / time.min_s / 1e9,
            "floor_ratio": time.min_s / floor,
            "vtengine_faster": time.min_s / best,
            "levels_off": levels.get(name),
            "isa": library.isas()[0] if library.isas() else "none",
        }
        for name, time in times.items()
    ]


def levels_off(call: Callable[[], Any], exact: torch.Tensor) -> float:
    """Largest difference in 8-bit levels."""
    std = torch.tensor(CLIP_STD).view(3, 1)
    difference = torch.as_tensor(call()).view(-1, 3, 392) - exact.view(-1, 3, 392)
    return round(float((difference * std * 255).abs().max()), 3)


def memory_copy(moved: int, threads: int) -> Callable[[], None]:
    """Reads moved / 2 bytes and writes as many. Source pages that were never written would all be the system's one page
    of zeros, which stays in the caches."""
    source, to = np.ones(moved // 2, np.uint8), np.zeros(moved // 2, np.uint8)
    if threads == 1:
        return lambda: np.copyto(to, source)
    pool = ThreadPoolExecutor(threads)
    parts = list(zip(np.array_split(to, threads), np.array_split(source, threads), strict=True))
    return lambda: list(pool.map(lambda part: np.copyto(*part), parts)) and None


def ours(context: Any, image: np.ndarray, low: Target, high: Target) -> list[dict[str, Any]]:
    """vtengine with itself: both views in one call, and the forms of the output."""
    forms = {"float32, full": (torch.float32, "full", 1176), "bfloat16, compact": (torch.bfloat16, "compact", 588)}
    rows = []
    for form, (dtype, layout, columns) in forms.items():
        outs = [torch.zeros(target.rows(14), columns, dtype=dtype) for target in (low, high)]
        for threads in (1, 2):
            call = partial(patchify, image, num_threads=threads, dtype=dtype, layout=layout)
            times = context.compare(
                {
                    "low": partial(call, [low], out=outs[:1]),
                    "high": partial(call, [high], out=outs[1:]),
                    "low and high, one call": partial(call, [low, high], out=outs),
                },
                rounds=7,
                min_round_s=0.02,
            )
            apart = times["low"].min_s + times["high"].min_s
            for name, time in times.items():
                row = {"part": "ours", "image": f"{image.shape[1]}x{image.shape[0]}", "candidate": f"{name}; {form}"}
                row |= {"threads": threads, "ms": 1e3 * time.min_s, "cpu_ms": 1e3 * time.cpu_s}
                together = name.startswith("low and")
                row |= {"relative": time.min_s / apart, "to": "low + high apart"} if together else {}
                rows.append(row)
    return rows


def batch(context: Any, rng: np.random.Generator) -> list[dict[str, Any]]:
    """16 images of 1024x768 on one worker thread and on two."""
    images = [smooth(rng, 768, 1024) for _ in range(16)]
    targets = [Target(*side) for side in ((392, 504), (756, 1036))]
    outs = [[torch.zeros(target.rows(14), 588, dtype=torch.bfloat16) for target in targets] for _ in images]
    call = partial(patchify, dtype=torch.bfloat16, layout="compact")
    pools = {workers: ThreadPoolExecutor(workers) for workers in (1, 2)}

    def all_images(workers: int) -> list[Any]:
        jobs = zip(images, outs, strict=True)
        return list(pools[workers].map(lambda job: call(job[0], targets, out=job[1]), jobs))

    times = context.compare({str(workers): partial(all_images, workers) for workers in pools}, rounds=7)
    one = times["1"].min_s
    return [
        {
            "part": "ours",
            "image": "16 of 1024x768",
            "candidate": "low and high; bfloat16, compact",
            "threads": int(workers),
            "ms": 1e3 * time.min_s,
            "cpu_ms": 1e3 * time.cpu_s,
            "relative": one / time.min_s,
            "to": "one worker",
        }
        for workers, time in times.items()
    ]


def aims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was set out to reach, as far as the peers it names were here."""
    found = []

    def aim(image: str, name: str, wanted: float, got: float, *, at_most: bool = False) -> None:
        met = got <= wanted if at_most else got >= wanted
        found.append({"part": "aims", "image": image, "candidate": name, "wanted": wanted, "got": got, "met": met})

    named = {f"{width}x{height}": index for index, (width, height) in enumerate(SIZES)}
    for row in rows:
        image, view, threads = row["image"], row.get("view"), row["threads"]
        if row["part"] == "ours":
            if row.get("to") == "low + high apart":
                aim(image, f"{row['candidate']}, threads: {threads}", 1.1, row["relative"], at_most=True)
            elif row.get("to") and threads == 2:
                aim(image, "times one worker", 1.8, row["relative"])
        elif row["candidate"] == COMPOSED and threads == 1 and named[image] >= 2:
            aim(
                image,
                f"{view}: times the best composed pipeline, 1 thread",
                3 if view == "high" else 2,
                row["vtengine_faster"],
            )
        elif row["candidate"] == BACKENDS["torchvision"] and threads == 2:
            wanted = AIMS_2_THREADS[view][named[image]]
            aim(image, f"{view}: times transformers as shipped, 2 threads", wanted, row["vtengine_faster"])
        elif row["candidate"] == "vtengine" and threads == 2 and view == "high" and named[image] == 3:
            aim(image, "high: times a memory copy, 2 threads", 1.5, row["floor_ratio"], at_most=True)
    return found
