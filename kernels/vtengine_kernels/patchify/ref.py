"""Plain numpy implementation: the truth that the others are held against, and the fallback without a compiler."""

from __future__ import annotations

import numpy as np
import torch

from vtengine_kernels.patchify.contract import FRAMES, Plan
from vtengine_kernels.patchify.fixed_point import PRECISION_BITS, Filter, Mode, vertical_first, weights


def missing() -> None:
    """It is always here."""


def run(plan: Plan) -> list[torch.Tensor]:
    """Writes every target of the plan into its output tensor and returns these."""
    for target, (left, top, right, bottom), out in zip(plan.targets, plan.boxes, plan.outputs, strict=True):
        levels = np.asarray(plan.image)[top:bottom, left:right]
        for step in target.before:
            levels = resize(levels, step.height, step.width, step.filter, plan.mode)
        levels = resize(levels, target.height, target.width, plan.filter, plan.mode)
        rows = patches(levels, FRAMES[plan.layout], plan.patch)
        out.copy_(torch.from_numpy(lookup(plan.table, rows)))
    return list(plan.outputs)


def resize(levels: np.ndarray, height: int, width: int, kind: Filter, mode: Mode) -> np.ndarray:
    """uint8 [height, width, 3]: Pillow's `image.resize((width, height), kind)`, or torch's, level by level."""
    axes = [1, 0]
    if vertical_first(levels.shape[0], levels.shape[1], height, width, mode):
        axes = [0, 1]
    for axis in axes:
        levels = _resample(levels, (height, width)[axis], axis, kind, mode)
    return levels


def _resample(levels: np.ndarray, size: int, axis: int, kind: Filter, mode: Mode) -> np.ndarray:
    if levels.shape[axis] == size:
        return levels
    first, weight = weights(levels.shape[axis], size, kind, mode)
    shape = [1, 1, 1]
    shape[axis] = size
    total = np.full((*levels.shape[:axis], size, *levels.shape[axis + 1 :]), 1 << (PRECISION_BITS - 1), dtype=np.int32)
    last = levels.shape[axis] - 1
    for tap in range(weight.shape[1]):
        source = np.take(levels, np.minimum(first + tap, last), axis=axis)  # weight 0 where clamped
        total += source.astype(np.int32) * weight[:, tap].reshape(shape)
    return np.clip(total >> PRECISION_BITS, 0, 255).astype(np.uint8)


def patches(levels: np.ndarray, frames: int, patch: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [H/patch * W/patch, 3 * frames * patch^2], rows in merge-window order."""
    height, width, _ = levels.shape
    split = levels.reshape(height // patch // 2, 2, patch, width // patch // 2, 2, patch, 3)
    ordered = split.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]  # window row, window, mh, mw, channel, 1, y, x
    repeated = np.broadcast_to(ordered, (*ordered.shape[:5], frames, patch, patch))
    return repeated.reshape(height // patch * (width // patch), 3 * frames * patch * patch)


def lookup(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """float32, shaped as `rows`: each level's value in its channel."""
    by_channel = rows.reshape(rows.shape[0], 3, -1)
    return table[np.arange(3)[:, None], by_channel].reshape(rows.shape)
