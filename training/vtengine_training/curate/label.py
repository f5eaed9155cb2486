"""The label of a question, from how often it was answered rightly at each resolution. Pure."""

from __future__ import annotations

from typing import Literal

Label = Literal["low_is_enough", "needs_high", "neither", "unscored", "rejected"]
"""neither: between the two. unscored: a reply broke, or had no verdict. rejected: its image cannot be read."""


def label(low_correct: int, high_correct: int, rollouts: int, margin: int) -> Label:
    """The rule of VisionThink (arXiv 2507.13348): all right at both views, or `margin` more right at the high one."""
    if low_correct == high_correct == rollouts:
        return "low_is_enough"
    return "needs_high" if high_correct - low_correct >= margin else "neither"
