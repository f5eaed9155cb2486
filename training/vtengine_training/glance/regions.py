"""Which part of a picture must be seen closer for a question: what a model that crops is taught to point at."""

from __future__ import annotations

import math

from vtengine.vision.plan import PATCH, Box, ViewPlan
from vtengine_training.glance.scene import Query, Scene

MARGIN = PATCH + 1
"""Low-view pixels around the glyphs: with a patch of what lies about them the model reads as well as in the whole."""


def region(scene: Scene, query: Query, low: ViewPlan) -> Box:
    """The box, in low-view pixels, whole patches: everything written as small as what answers the question.

    Not the answer alone: in the low view nobody can tell which line of a receipt is about tea.
    """
    small = [glyph for glyph in scene.glyphs if glyph.cap == query.cap] or list(scene.glyphs)
    height, width = scene.image.shape[:2]
    x, y = low.width / width, low.height / height
    left, right = _outwards(min(g.x for g in small) * x, max(g.x + g.w for g in small) * x, low.width)
    top, bottom = _outwards(min(g.y for g in small) * y, max(g.y + g.h for g in small) * y, low.height)
    return left, top, right, bottom


def _outwards(start: float, stop: float, side: int) -> tuple[int, int]:
    first, last = math.floor((start - MARGIN) / PATCH), math.ceil((stop + MARGIN) / PATCH)
    return max(0, first * PATCH), min(side, last * PATCH)
