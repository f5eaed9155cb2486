"""Antialiased 8-bit resampling, as numbers: fixed-point weights and the order of the two passes.

Pillow's weights have 22 fractional bits. torch's (and torchvision's) have 16 bits in all, the fractional ones as many
as the largest weight of the axis leaves; shifted up to 22 fractional bits they give the same levels by the same sum.

Sources: Pillow, src/libImaging/Resample.c (12.x), and Pillow 13 for the order of the passes; PyTorch,
aten/src/ATen/native/cpu/UpSampleKernel.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

Filter = Literal["bicubic", "lanczos"]
Mode = Literal["pil13", "pil12", "tv"]
MODES: tuple[Mode, ...] = ("pil13", "pil12", "tv")
Box = tuple[int, int, int, int]  # left, top, right, bottom in source pixels; right and bottom exclusive

PRECISION_BITS = 22  # 32 bits - 8 of the value - 2 of headroom for negative lobes


def bicubic(x: np.ndarray) -> np.ndarray:
    """Cubic convolution with a = -0.5; support 2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def lanczos(x: np.ndarray) -> np.ndarray:
    """Sinc windowed by a sinc; support 3."""
    return np.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: np.ndarray) -> np.ndarray:
    angle = np.where(x == 0.0, 1.0, x * math.pi)
    return np.where(x == 0.0, 1.0, np.sin(angle) / angle)


FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "bicubic": (bicubic, 2.0),
    "lanczos": (lanczos, 3.0),
}


def weights(size_in: int, size_out: int, kind: Filter, mode: Mode) -> tuple[np.ndarray, np.ndarray]:
    """(first [size_out] int64, weight [size_out, taps] int32): output i is the sum over t of weight[i, t] *
    input[first[i] + t], rounded and shifted right by PRECISION_BITS. Weights past the edge of the input are 0."""
    function, support = FILTERS[kind]
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support *= stretch
    center = (np.arange(size_out) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    last = np.minimum((center + support + 0.5).astype(np.int64), size_in)
    taps = np.arange(int((last - first).max()))
    inside = taps < (last - first)[:, None]
    weight = function((taps + first[:, None] - center[:, None] + 0.5) * (1.0 / stretch)) * inside
    total = np.zeros(size_out)
    for column in weight.T:  # one after another: the rounding of the sum is part of the result
        total += column
    weight /= np.where(total != 0.0, total, 1.0)[:, None]
    bits = int16_bits(float(weight.max())) if mode == "tv" else PRECISION_BITS
    scaled = weight * (1 << bits)
    rounded = np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int32)
    return first, rounded << (PRECISION_BITS - bits)


def int16_bits(largest: float) -> int:
    """Fractional bits with which weights up to `largest` fit 16 bits, at most 22."""
    bits = 0
    while bits < PRECISION_BITS and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return bits


def vertical_first(height_in: int, width_in: int, height_out: int, width_out: int, mode: Mode) -> bool:
    """Whether the columns are resampled before the rows. Each pass rounds to 8 bits, so the order shows."""
    shrink = height_in - height_out
    return mode == "pil13" and shrink > 0 and shrink > 2 * (width_in - width_out)
