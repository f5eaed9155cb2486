"""Pages full of random characters: no questions, only dense labels. Reading practice for the vision tower."""

from __future__ import annotations

import numpy as np

from vtengine_training.glance.ink import CELL, Canvas, pick_colours
from vtengine_training.glance.scene import DIGITS, LETTERS, NO_FIELD, Scene

SIDE_CELLS = 8


def make_page(seed: int, number: int) -> Scene:
    """Page `number`, from a stream of its own; 8 x 8 cells, small (for the high view) or large (for the low view)."""
    rng = np.random.default_rng([1000, seed, number])
    scale = "small" if rng.random() < 0.6 else "large"
    paper, ink = pick_colours(rng)
    side = SIDE_CELLS * CELL[scale]
    canvas = Canvas(rng, side, side, paper)
    for row in range(SIDE_CELLS):
        pool = DIGITS if rng.random() < 0.5 else LETTERS + "."
        drawn = (pool[int(i)] if rng.random() < 0.85 else " " for i in rng.integers(0, len(pool), SIDE_CELLS))
        canvas.write("".join(drawn), 0, row * CELL[scale], scale, ink, NO_FIELD)
    return Scene("page", canvas.finish(), tuple(canvas.glyphs), (), ())
