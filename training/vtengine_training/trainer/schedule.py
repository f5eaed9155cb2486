"""The learning rate of a step. Pure."""

from __future__ import annotations

import math

from vtengine_training.trainer.config import UpdateConfig


def learning_rate(update: UpdateConfig, step: int, steps: int) -> float:
    """Of step `step` (from 0) of `steps`: linear warm-up, then constant, or a straight line or half a cosine that ends
    at final_rate with the last step."""
    peak, final = update.learning_rate, update.final_rate
    if step < update.warmup:
        return peak * (step + 1) / update.warmup
    if update.schedule == "constant":
        return peak
    done = min(1.0, (step - update.warmup + 1) / max(1, steps - update.warmup))
    left = 1 - done if update.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return final + (peak - final) * left
