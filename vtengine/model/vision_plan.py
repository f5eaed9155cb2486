"""Where every patch of a pack of images goes in the vision tower: windows, images, coordinates. Cached per pack.

Attention inside a window or an image does not depend on the order of its rows, so rows are kept in the order that suits
window attention (most layers): windows of equal size lie next to each other and are one batched call without a mask.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vtengine.model.attention import Runs
from vtengine.model.positions import Grid
from vtengine.model.qwen2_5_config import VisionConfig


@dataclass(frozen=True)
class VisionPlan:
    """order: int64 [V], the input's visual token at each place; restore: its inverse. V = P / merge_unit.

    windows: window attention over the P rows in `order`. images: full attention, over those rows if `image_order` is
    None (one image), else over the rows taken by `image_order` int64 [P], whose inverse is `image_restore`.
    rows, columns: int64 [P], the patch coordinates of each row in `order`.
    """

    order: Tensor
    restore: Tensor
    windows: Runs
    images: Runs
    image_order: Tensor | None
    image_restore: Tensor | None
    rows: Tensor
    columns: Tensor


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def vision_plan(grids: tuple[Grid, ...], config: VisionConfig, device: torch.device) -> VisionPlan:
    """grids: (t, h, w) in patches, h and w multiples of the merge size. Raises ValueError for anything else."""
    merge, unit = config.spatial_merge_size, config.merge_unit
    windows: list[np.ndarray] = []
    coordinates: list[np.ndarray] = []
    frames: list[tuple[int, int]] = []  # (first visual token, visual tokens) of every frame
    total = 0
    for t, h, w in grids:
        check_grid((t, h, w), merge)
        size = h * w // unit
        for _ in range(t):
            windows += [window + total for window in _frame_windows(h // merge, w // merge, config.window_tokens)]
            coordinates.append(frame_coordinates(h, w, merge))
            frames.append((total, size))
            total += size
    windows.sort(key=len, reverse=True)  # stable: neighbours stay neighbours
    order = np.concatenate(windows)
    restore = np.argsort(order)
    frames.sort(key=lambda frame: frame[1], reverse=True)
    image_order = None
    if len(frames) > 1:
        tokens = np.concatenate([restore[first : first + size] for first, size in frames])
        image_order = (tokens[:, None] * unit + np.arange(unit)).reshape(-1)
    place = np.concatenate(coordinates, axis=1).reshape(2, total, unit)[:, order].reshape(2, -1)
    return VisionPlan(
        order=_tensor(order, device),
        restore=_tensor(restore, device),
        windows=runs_of([len(window) * unit for window in windows]),
        images=runs_of([size * unit for _, size in frames]),
        image_order=None if image_order is None else _tensor(image_order, device),
        image_restore=None if image_order is None else _tensor(np.argsort(image_order), device),
        rows=_tensor(place[0], device),
        columns=_tensor(place[1], device),
    )


@functools.lru_cache(maxsize=64)
def _frame_windows(height: int, width: int, side: int) -> tuple[np.ndarray, ...]:
    """Row-major visual tokens of every window of a frame of height x width tokens; border windows are smaller."""
    index = np.arange(height * width).reshape(height, width)
    return tuple(
        index[top : top + side, left : left + side].reshape(-1)
        for top in range(0, height, side)
        for left in range(0, width, side)
    )


@functools.lru_cache(maxsize=64)
def frame_coordinates(height: int, width: int, merge: int) -> np.ndarray:
    """int64 [2, height * width]: row and column of every patch of a frame, in merge-window order."""
    grid = np.indices((height, width)).reshape(2, height // merge, merge, width // merge, merge)
    return grid.transpose(0, 1, 3, 2, 4).reshape(2, -1)


def check_grid(grid: Grid, merge: int) -> None:
    t, h, w = grid
    if t < 1 or h < 1 or w < 1 or h % merge or w % merge:
        raise ValueError(f"grid {(t, h, w)}: (t, h, w) in patches must be positive, h and w multiples of {merge}")


def runs_of(lengths: list[int]) -> Runs:
    """Neighbours of equal length are one run."""
    items: list[tuple[int, int]] = []
    for length in lengths:
        if items and items[-1][0] == length:
            items[-1] = (length, items[-1][1] + 1)
        else:
            items.append((length, 1))
    return Runs(tuple(items))


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)
