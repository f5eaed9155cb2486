"""Scenes by number: `make_scene(split, seed, index)` is a pure function, so any worker can make any scene.

The split's name is part of the random key: train, validation and test scenes come from different streams whatever
seed is used, so they are disjoint by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vtengine_training.glance import documents, graphics
from vtengine_training.glance.ink import LARGE_CAPS
from vtengine_training.glance.scene import DIGITS, KINDS, LETTERS, Query, Scene

SPLITS = ("train", "validation", "test")
MAKERS: dict[str, Callable[[np.random.Generator], Scene]] = {
    "note": documents.note,
    "label": documents.label,
    "receipt": documents.receipt,
    "table": documents.table,
    "bars": graphics.bars,
    "meter": documents.meter,
    "shapes": graphics.shapes,
}
ODD_SIZES = 0.12
"""Share of scenes whose sides are no multiples of 28."""


def scene_rng(split: str, seed: int, index: int) -> np.random.Generator:
    """The random stream of one scene. Raises ValueError for an unknown split or a negative number."""
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is unknown; use one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index: {seed}, {index}; both must be 0 or more")
    return np.random.default_rng([SPLITS.index(split), seed, index])


def make_scene(split: str, seed: int, index: int, kind: str | None = None) -> Scene:
    """Scene `index` of a split; the kind is drawn evenly unless given. About 1 ms."""
    rng = scene_rng(split, seed, index)
    drawn = KINDS[int(rng.integers(len(KINDS)))]
    if kind is not None and kind not in MAKERS:
        raise ValueError(f"kind: {kind!r} is unknown; use one of {', '.join(KINDS)}")
    scene = MAKERS[kind or drawn](rng)
    return _odd_size(rng, scene) if rng.random() < ODD_SIZES else scene


def _odd_size(rng: np.random.Generator, scene: Scene) -> Scene:
    """Up to 6 px off or on at the right and the lower edge: the views are a little larger or smaller than drawn.

    Large type may only grow and small type only shrink, or it would no longer be clear whether the low view suffices.
    """
    height, width = scene.image.shape[:2]
    caps = {query.cap for query in scene.queries if query.cap is not None}
    if caps and max(caps) < LARGE_CAPS[0]:
        more = rng.integers(0, 7, 2)
        image = np.pad(scene.image, ((0, int(more[0])), (0, int(more[1])), (0, 0)), mode="edge")
    elif not caps or min(caps) >= LARGE_CAPS[0]:
        right = max([g.x + g.w for g in scene.glyphs] + [m.x + m.w for m in scene.marks])
        lower = max([g.y + g.h for g in scene.glyphs] + [m.y + m.h for m in scene.marks])
        width -= int(rng.integers(0, max(1, min(6, width - right - 1) + 1)))
        height -= int(rng.integers(0, max(1, min(6, height - lower - 1) + 1)))
        image = scene.image[:height, :width]
    else:
        image = scene.image
    return replace(scene, image=np.ascontiguousarray(image))


def guess(rng: np.random.Generator, query: Query) -> str:
    """A random answer of the right form: what someone says who cannot read the picture."""
    if "|" in query.form:
        choices = query.form.split("|")
        return choices[int(rng.integers(len(choices)))]
    draw = {"d": DIGITS, "L": LETTERS}
    return "".join(draw[c][int(rng.integers(len(draw[c])))] if c in draw else c for c in query.form)
