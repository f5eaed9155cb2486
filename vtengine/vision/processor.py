"""How a checkpoint wants its images: what the files of its image processor state."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vtengine.vision.plan import MERGE, QWEN3_LIMITS, PixelLimits

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""What may describe an image processor; the second one, where it does, counts for transformers 5."""


class ImageProcessor(NamedTuple):
    """How a checkpoint wants its images. mean, std: of the three channels."""

    limits: PixelLimits
    mean: tuple[float, ...]
    std: tuple[float, ...]


def image_processor(folder: Path) -> ImageProcessor:
    """What the checkpoint's image processor states, as released or as transformers 5 writes it; for what it leaves out
    the values that its family was released with. Raises ValueError for pixels that we would not make."""
    config: dict[str, Any] = {}
    for name in PROCESSOR_FILES:
        found = read_json(folder / name) if (folder / name).is_file() else {}
        config |= _part(found, "image_processor") or found
    family = _family(folder)
    _check_processor(folder, config, family)
    size = _part(config, "size")
    stated = {"min_pixels": config.get("min_pixels") or size.get("shortest_edge")}
    stated["max_pixels"] = config.get("max_pixels") or size.get("longest_edge")
    for name, value in stated.items():
        if value is not None and type(value) is not int:
            raise _unfit(folder, name, value, "must be a whole number of pixels")
    try:
        limits = replace(family.limits, **{key: value for key, value in stated.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{folder}: its image processor's file: {error}") from None
    return family._replace(limits=limits)


def _family(folder: Path) -> ImageProcessor:
    from vtengine_kernels.patchify import CLIP_MEAN, CLIP_STD, HALF

    if read_json(folder / "config.json").get("model_type") == "qwen3_vl":
        return ImageProcessor(QWEN3_LIMITS, HALF, HALF)
    return ImageProcessor(PixelLimits(), CLIP_MEAN, CLIP_STD)


def _check_processor(folder: Path, config: dict[str, Any], family: ImageProcessor) -> None:
    """Raises ValueError for pixel values that we would not make: their model would be shown others without a word."""
    for name, ours in (("patch_size", family.limits.patch), ("temporal_patch_size", 2), ("merge_size", MERGE)):
        if config.get(name, ours) != ours:
            raise _unfit(folder, name, config[name], f"only {ours} is supported for this model")
    for name, mean_or_std in (("image_mean", family.mean), ("image_std", family.std)):
        stated = config.get(name, mean_or_std)
        try:
            fits = all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(stated, mean_or_std, strict=True))
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise _unfit(folder, name, stated, f"only {list(mean_or_std)} is supported for this model")


def _unfit(folder: Path, name: str, value: object, remedy: str) -> ValueError:
    return ValueError(f"{folder}: its image processor's file says {name} = {value!r}: {remedy}")


def _part(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file of a checkpoint. Raises ValueError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return config
