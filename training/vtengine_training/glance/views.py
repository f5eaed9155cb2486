"""A scene's low and high view as the inference pipeline makes them: one Pillow-exact resize from the original."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vtengine.vision.plan import PATCH, PixelLimits, ViewPlan, plan_high, plan_low
from vtengine_training.glance.scene import Query, Scene, needs_high

LIMITS = PixelLimits(min_pixels=3136, max_pixels=280 * 224)
"""What the shipped checkpoint's processor files say: 4 to 80 visual tokens."""


def plans(scene: Scene) -> tuple[ViewPlan, ViewPlan]:
    """(low, high)."""
    height, width = scene.image.shape[:2]
    high = plan_high(width, height, LIMITS)
    return plan_low(high), high


def query_needs_high(scene: Scene, query: Query) -> bool:
    """Whether the low view of this scene is too small for this query."""
    height, width = scene.image.shape[:2]
    low, _ = plans(scene)
    return needs_high(query, min(low.width / width, low.height / height))


def patches(scene: Scene, plan: ViewPlan) -> np.ndarray:
    """The view as uint8 [P, 588]: 14x14 patches, channels first, in merge-window order, not yet normalised."""
    image = scene.image
    if image.shape[:2] != (plan.height, plan.width):
        resized = Image.fromarray(image).resize((plan.width, plan.height), Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    rows, columns = plan.grid_thw[1] // 2, plan.grid_thw[2] // 2
    cut = image.reshape(rows, 2, PATCH, columns, 2, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(cut).reshape(-1, 3 * PATCH * PATCH)
