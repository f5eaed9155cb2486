"""From 8-bit levels to the floats of transformers' two image processors: a table of 3 x 256 values."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from vtengine_kernels.patchify.fixed_point import Mode

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # mean and standard deviation of Qwen3-VL


@dataclass(frozen=True)
class Affine:
    """(float32(level * unit) - mean) / std, the latter two operations in float32."""

    unit: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def affine(mean: tuple[float, ...], std: tuple[float, ...], mode: Mode) -> Affine:
    """The arithmetic of the transformers processor whose resize `mode` repeats.

    PIL: rescale by 1/255 in float64, rounded to float32, minus mean, divided by std. torchvision: the level minus
    255 * mean, divided by 255 * std (both products in float32).
    """
    if mode != "tv":
        return Affine(1 / 255, mean, std)
    with np.errstate(over="ignore"):
        scaled = [[float(np.float32(value) * np.float32(255)) for value in values] for values in (mean, std)]
    return Affine(1.0, tuple(scaled[0]), tuple(scaled[1]))


def level_table(mean: tuple[float, ...], std: tuple[float, ...], mode: Mode) -> np.ndarray:
    """float32 [3, 256]: value of each level in each channel, bit-equal to the processor's."""
    return table_of(affine(mean, std, mode))


@functools.lru_cache(maxsize=16)
def table_of(form: Affine) -> np.ndarray:
    """float32 [3, 256], as level_table."""
    unit = (np.arange(256, dtype=np.float64) * form.unit).astype(np.float32)
    mean32 = np.asarray(form.mean, dtype=np.float32)[:, None]
    std32 = np.asarray(form.std, dtype=np.float32)[:, None]
    with np.errstate(over="ignore", invalid="ignore"):  # a tiny std gives infinities, as it does elsewhere
        table = np.ascontiguousarray((unit[None, :] - mean32) / std32)
    table.flags.writeable = False  # it is shared
    return table
