"""From 8-bit levels to the floats of the transformers PIL image processor: a table of 3 x 256 values."""

from __future__ import annotations

import functools

import numpy as np

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@functools.lru_cache(maxsize=16)
def level_table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """float32 [3, 256]: value of each level in each channel, bit-equal to rescale by 1/255 (in float64, rounded to
    float32), minus mean, divided by std (both in float32)."""
    unit = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean32 = np.asarray(mean, dtype=np.float32)[:, None]
    std32 = np.asarray(std, dtype=np.float32)[:, None]
    with np.errstate(over="ignore"):  # a tiny std gives infinities, as it does elsewhere
        table = np.ascontiguousarray((unit[None, :] - mean32) / std32)
    table.flags.writeable = False  # it is shared
    return table
