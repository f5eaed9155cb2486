"""patchify against what people use: transformers' two processors, Pillow + numpy, OpenCV, torch's own resize.

Every candidate makes the full float32 rows of one view from the same uint8 image; `levels_off` is its largest
difference from Pillow's resize in 8-bit levels (0 = exact). The floor is a memory copy that reads and writes as many
bytes as image and rows have together, with the same number of threads. torchvision and OpenCV take part where they are
installed. vtengine's outputs come from its buffer pool, except in the row "fresh memory". Times are the least over the
rounds, `cpu_ms` and `median_ms` are medians. Rows with `part` = "ours" compare vtengine with itself: views together and
apart, forms of the output, threads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from vtengine_kernels import buffers, library
from vtengine_kernels.patchify import CLIP_MEAN, CLIP_STD, Target, patchify
from vtengine_kernels.patchify.normalise import level_table

from vtengine.vision.plan import PixelLimits, plan_high, plan_low

_KEPT: list[Any] = []  # torch forgets declared operators with their library
TESTS = ["tests/kernels"]
SIZES = [(512, 512), (1024, 768), (2048, 1024), (4096, 3072)]
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
    "patchify-low": {"columns": _COLUMNS, "where": {"part": "peers", "view": "low"}},
    "patchify-ours": {
        "columns": {
            "image": "Image",
            "candidate": "Variant",
            "threads": "Threads",
            "ms": "ms",
            "relative": "ratio",
            "to": "to",
        },
        "where": {"part": "ours"},
    },
}


def run(context: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for width, height in SIZES[:2] if context.quick else SIZES:
        image = smooth(rng, height, width)
        high = plan_high(width, height, PixelLimits())
        low = plan_low(high)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for view, plan in (("high", high), ("low", low)):
                rows += peers(context, image, view, Target(plan.height, plan.width), threads)
        rows += ours(context, image, Target(low.height, low.width), Target(high.height, high.width))
    torch.set_num_threads(1)
    return rows + batch(context, rng)


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture-like image: soft shapes with some noise."""
    small = Image.fromarray(rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8))
    large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return np.clip(large + rng.integers(-8, 9, large.shape), 0, 255).astype(np.uint8)


def peers(context: Any, image: np.ndarray, view: str, target: Target, threads: int) -> list[dict[str, Any]]:
    """One row per candidate for one view."""
    out = torch.zeros(target.rows, 1176)
    moved = image.nbytes + out.nbytes
    candidates: dict[str, Callable[[], Any]] = {
        "vtengine": lambda: patchify(image, [target], num_threads=threads)[0],
        "vtengine, fresh memory": lambda: (
            buffers.outputs.release() or patchify(image, [target], num_threads=threads)[0]
        ),
        "Pillow + numpy": partial(pillow_numpy, image, target, out),
        "torch resize + torch": partial(torch_composed, image, target, out),
        **optional_peers(image, target, out),
        "memory copy": memory_copy(moved, threads),
    }
    exact = patchify(image, [target], impl="ref")[0]
    levels = {name: levels_off(call, exact) for name, call in candidates.items() if name != "memory copy"}
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


def pillow_numpy(image: np.ndarray, target: Target, out: torch.Tensor) -> torch.Tensor:
    """Pillow's resize, a table for the floats, one transposing copy into memory that is there."""
    resized = np.asarray(Image.fromarray(image).resize((target.width, target.height), Image.Resampling.BICUBIC))
    return fill(resized, target, out)


def fill(resized: np.ndarray, target: Target, out: torch.Tensor) -> torch.Tensor:
    table = level_table(CLIP_MEAN, CLIP_STD)
    windows = resized.reshape(target.height // 28, 2, 14, target.width // 28, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    rows = out.numpy().reshape(*windows.shape[:4], 3, 2, 14, 14)
    for channel in range(3):
        rows[:, :, :, :, channel] = table[channel][windows[:, :, :, :, channel]][:, :, :, :, None]
    return out


def torch_composed(image: np.ndarray, target: Target, out: torch.Tensor) -> torch.Tensor:
    """The best one can put together: torch's 8-bit vector resize (torchvision's), patches in 8 bits, one fused add."""
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        planes, size=(target.height, target.width), mode="bicubic", antialias=True, align_corners=False
    )[0]
    windows = resized.view(3, target.height // 28, 2, 14, target.width // 28, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
    std = torch.tensor(CLIP_STD).view(3, 1, 1, 1)
    shift = -torch.tensor(CLIP_MEAN).view(3, 1, 1, 1) / std
    rows = out.view(*windows.shape[:4], 3, 2, 14, 14)
    levels = windows.contiguous().unsqueeze(5)
    torch.addcmul(shift, levels, 1 / (255 * std), out=rows[:, :, :, :, :, :1])
    rows[:, :, :, :, :, 1:] = rows[:, :, :, :, :, :1]
    return out


def optional_peers(image: np.ndarray, target: Target, out: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """transformers, torchvision and OpenCV, as far as they are installed."""
    found: dict[str, Callable[[], Any]] = {}
    pixels = target.height * target.width
    limits = {"min_pixels": pixels, "max_pixels": pixels}  # the processors' own rule then gives this very size
    with_torchvision = import_torchvision()  # first: transformers looks for it
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        found["transformers, PIL processor"] = processor_call(Qwen2VLImageProcessorPil(**limits), image, out, target)
    except ImportError:
        pass
    if with_torchvision:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        found["transformers, default processor"] = processor_call(Qwen2VLImageProcessor(**limits), image, out, target)
    try:
        import cv2

        cv2.setNumThreads(torch.get_num_threads())
        size = (target.width, target.height)
        found["OpenCV + numpy"] = lambda: fill(cv2.resize(image, size, interpolation=cv2.INTER_AREA), target, out)
    except ImportError:
        pass
    return found


@functools.cache
def import_torchvision() -> bool:
    """PyPI's torchvision is built for CUDA. Beside a torch without it, it does not import for want of two operators
    that image processing does not use; so they are declared first."""
    if not torch.cuda.is_available():
        library_of_ops = torch.library.Library("torchvision", "FRAGMENT")
        for schema in (
            "nms(Tensor dets, Tensor scores, float iou) -> Tensor",
            "qnms(Tensor a, Tensor b, float c) -> Tensor",
        ):
            with contextlib.suppress(RuntimeError):  # declared already
                library_of_ops.define(schema)
        _KEPT.append(library_of_ops)
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        return False
    return True


def processor_call(processor: Any, image: np.ndarray, out: torch.Tensor, target: Target) -> Callable[[], Any]:
    """As shipped: the caller hands over an array and gets new tensors. Where the processor's rule gives another size
    than the view has, the caller resizes with Pillow first."""

    def whole() -> Any:
        return processor(images=[image], return_tensors="pt")["pixel_values"]

    def in_two_steps() -> Any:
        small = Image.fromarray(image).resize((target.width, target.height), Image.Resampling.BICUBIC)
        return processor(images=[small], return_tensors="pt", do_resize=False)["pixel_values"]

    return whole if tuple(whole().shape) == tuple(out.shape) else in_two_steps


def memory_copy(moved: int, threads: int) -> Callable[[], None]:
    """Reads moved / 2 bytes and writes as many."""
    source, to = np.zeros(moved // 2, np.uint8), np.zeros(moved // 2, np.uint8)
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
        outs = [torch.zeros(target.rows, columns, dtype=dtype) for target in (low, high)]
        options = {"dtype": dtype, "layout": layout}
        for threads in (1, 2):
            call = partial(patchify, image, num_threads=threads, **options)
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
    outs = [[torch.zeros(target.rows, 588, dtype=torch.bfloat16) for target in targets] for _ in images]
    options = {"dtype": torch.bfloat16, "layout": "compact"}
    pools = {workers: ThreadPoolExecutor(workers) for workers in (1, 2)}

    def all_images(workers: int) -> list[Any]:
        jobs = zip(images, outs, strict=True)
        return list(pools[workers].map(lambda job: patchify(job[0], targets, out=job[1], **options), jobs))

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
