"""What patchify is compared with: the same rows from the same image, by other means.

A chain is a list of resizes; the last one makes the view. Each peer is a call without arguments that returns float32
rows [N, 1176]; those of libraries that are not installed are left out. `make bench-peers` installs them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from vtengine_kernels.patchify import CLIP_MEAN, CLIP_STD, Step
from vtengine_kernels.patchify.normalise import level_table

from vtengine.vision.plan import PixelLimits

Peer = Callable[[], Any]
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
BACKENDS = {"torchvision": "transformers, default processor", "pil": "transformers, PIL processor"}
_KEPT: list[Any] = []  # torch forgets declared operators with their library


def peers(image: np.ndarray, chain: Sequence[Step], out: torch.Tensor) -> dict[str, Peer]:
    """Every peer that is here. Those that write into memory of the caller write into `out`."""
    with_torchvision = import_torchvision()  # first: transformers looks for it
    found: dict[str, Peer] = {}
    for backend, name in BACKENDS.items():
        processor = transformers_processor(backend) if backend == "pil" or with_torchvision else None
        if processor is not None:
            found[name] = as_shipped(image, chain, functools.partial(processor, return_tensors="pt"))
    with contextlib.suppress(ImportError):
        rust = importlib.import_module("hf_processors_rs").Qwen2VLImageProcessor
        processor = rust.from_dict({"image_processor_type": "Qwen2VLImageProcessor", **limits()})
        found["hf-processors-rs"] = as_shipped(
            image, chain, lambda images: processor(images, num_threads=torch.get_num_threads())
        )
    found["torchvision's resize + torch"] = lambda: torch_composed(image, chain, out)
    found["Pillow + numpy"] = lambda: fill(pillow_chain(image, chain), out)
    with contextlib.suppress(ImportError):
        cv2 = importlib.import_module("cv2")
        cv2.setNumThreads(torch.get_num_threads())
        found["OpenCV + numpy"] = lambda: fill(opencv_chain(cv2, image, chain), out)
    return found


def limits() -> dict[str, int]:
    """Those of the Qwen2.5-VL checkpoints."""
    default = PixelLimits()
    return {"min_pixels": default.min_pixels, "max_pixels": default.max_pixels}


def transformers_processor(backend: str) -> Any:
    """The Qwen2-VL image processor of a backend, or None."""
    name = "image_processing_pil_qwen2_vl" if backend == "pil" else "image_processing_qwen2_vl"
    try:
        module = importlib.import_module(f"transformers.models.qwen2_vl.{name}")
    except ImportError:
        return None
    return (module.Qwen2VLImageProcessorPil if backend == "pil" else module.Qwen2VLImageProcessor)(**limits())


def as_shipped(image: np.ndarray, chain: Sequence[Step], process: Callable[..., Any]) -> Peer:
    """The caller hands over an array, or what Pillow made of it where there are resizes before the processor's own, and
    gets new memory. ValueError: the processor's rule gives another size than the chain."""

    def call() -> Any:
        given = pillow_chain(image, chain[:-1]) if len(chain) > 1 else image
        return process([given])["pixel_values"]

    rows, last = len(call()), chain[-1]
    if rows != last.height // 14 * (last.width // 14):
        raise ValueError(f"{process}: made {rows} rows, not {last}")
    return call


def pillow_chain(image: np.ndarray, chain: Sequence[Step]) -> np.ndarray:
    """uint8 [H, W, 3] after all resizes."""
    picture = Image.fromarray(image)
    for step in chain:
        picture = picture.resize((step.width, step.height), PILLOW[step.filter])
    return np.asarray(picture)


def opencv_chain(cv2: Any, image: np.ndarray, chain: Sequence[Step]) -> np.ndarray:
    """OpenCV has no antialiased bicubic: areas where it halves, its own bicubic where the size hardly changes."""
    for step in chain:
        kind = cv2.INTER_AREA if step.filter == "lanczos" else cv2.INTER_CUBIC
        image = cv2.resize(image, (step.width, step.height), interpolation=kind)
    return image


def fill(resized: np.ndarray, out: torch.Tensor) -> torch.Tensor:
    """A table for the floats, one transposing copy into memory that is there."""
    table = level_table(CLIP_MEAN, CLIP_STD, "pil13")
    height, width, _ = resized.shape
    windows = resized.reshape(height // 28, 2, 14, width // 28, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    rows = out.numpy().reshape(*windows.shape[:4], 3, 2, 14, 14)
    for channel in range(3):
        rows[:, :, :, :, channel] = table[channel][windows[:, :, :, :, channel]][:, :, :, :, None]
    return out


def torch_composed(image: np.ndarray, chain: Sequence[Step], out: torch.Tensor) -> torch.Tensor:
    """The best one can put together: torch's 8-bit vector resize (torchvision's), patches in 8 bits, one fused add."""
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    for step in chain:
        planes = torch.nn.functional.interpolate(
            planes, size=(step.height, step.width), mode=step.filter, antialias=True, align_corners=False
        )
    _, _, height, width = planes.shape
    windows = planes[0].view(3, height // 28, 2, 14, width // 28, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
    std = torch.tensor(CLIP_STD).view(3, 1, 1, 1)
    shift = -torch.tensor(CLIP_MEAN).view(3, 1, 1, 1) / std
    rows = out.view(*windows.shape[:4], 3, 2, 14, 14)
    levels = windows.contiguous().unsqueeze(5)
    torch.addcmul(shift, levels, 1 / (255 * std), out=rows[:, :, :, :, :, :1])
    rows[:, :, :, :, :, 1:] = rows[:, :, :, :, :, :1]
    return out


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
