"""Dense labels out of the layout: what lies under each 14-px patch of a view.

Four labels per patch: the character, the field it belongs to, its position in that field, and the object. A model
trained from nothing reads only after very many steps if the answer's tokens are its only teacher; these labels teach
the vision tower directly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vtengine.vision.plan import PATCH, ViewPlan
from vtengine_training.glance.scene import (
    BARS,
    CHARS,
    COLOURS,
    ITEMS,
    NO_FIELD,
    SHAPES,
    TABLE_COLUMNS,
    TABLE_ROWS,
    Query,
    Scene,
)

IGNORE = -100
LEGIBLE = 5.0
"""Cap height in view pixels under which no character is demanded of the vision tower."""

KEYS = (
    *("number", "word", "code", "item", "head", "reading", "bar", "tallest", "circle", "square"),
    *ITEMS,
    *BARS,
    *(row + column for row in TABLE_ROWS for column in TABLE_COLUMNS),
)
OBJECTS = tuple((shape, colour) for shape in (*SHAPES, "bar") for colour in COLOURS)
SIZES = {"char": len(CHARS) + 1, "key": len(KEYS) + 1, "slot": 8, "object": len(OBJECTS) + 1}
"""Classes per label; class 0 is `nothing here`."""

_CHAR = {c: i + 1 for i, c in enumerate(CHARS)}
_KEY = {k: i + 1 for i, k in enumerate(KEYS)} | {"": 0}
_OBJECT = {o: i + 1 for i, o in enumerate(OBJECTS)}


@dataclass(frozen=True)
class PatchLabels:
    """int16 [P] each, patches in merge-window order; IGNORE where a patch holds too little of anything."""

    char: np.ndarray
    key: np.ndarray
    slot: np.ndarray
    object: np.ndarray

    def stack(self) -> np.ndarray:
        """int16 [P, 4]: char, key, slot, object."""
        return np.stack([self.char, self.key, self.slot, self.object], 1)


def patch_labels(scene: Scene, plan: ViewPlan) -> PatchLabels:
    """The labels of the view `plan` of a scene (the whole image, resized)."""
    rows, columns = plan.grid_thw[1:]
    height, width = scene.image.shape[:2]
    scale_x, scale_y = plan.width / width, plan.height / height
    grids = {name: np.zeros((rows, columns), np.int16) for name in SIZES}
    for mark in scene.marks:
        box = (mark.x * scale_x, mark.y * scale_y, (mark.x + mark.w) * scale_x, (mark.y + mark.h) * scale_y)
        for r, c, area in _overlaps(box, rows, columns):
            share = area / PATCH**2
            if share >= 0.5:
                grids["object"][r, c] = _OBJECT[mark.shape, mark.colour]
                grids["slot"][r, c] = mark.ordinal
            elif share > 0.05 and grids["object"][r, c] == 0:
                grids["object"][r, c] = IGNORE
                grids["slot"][r, c] = IGNORE
    best = np.zeros((rows, columns))
    for glyph in scene.glyphs:
        box = (glyph.x * scale_x, glyph.y * scale_y, (glyph.x + glyph.w) * scale_x, (glyph.y + glyph.h) * scale_y)
        legible = glyph.cap * scale_y >= LEGIBLE
        size = glyph.w * glyph.h * scale_x * scale_y
        for r, c, area in _overlaps(box, rows, columns):
            is_sure = area / size >= 0.5 or area / PATCH**2 >= 0.12
            if area <= best[r, c] or (not is_sure and area / size < 0.1):
                continue
            best[r, c] = area
            named = legible and is_sure
            grids["char"][r, c] = _CHAR[glyph.char] if named else IGNORE
            in_field = named and glyph.key != NO_FIELD
            grids["key"][r, c] = _KEY[glyph.key] if in_field else IGNORE
            grids["slot"][r, c] = glyph.slot + 1 if in_field else IGNORE
    return PatchLabels(**{name: _merge_order(grid) for name, grid in grids.items()})


def answer_tokens(scene: Scene, plan: ViewPlan, labels: np.ndarray, query: Query) -> list[np.ndarray]:
    """For each position of the answer, the visual tokens of this view that show it; empty arrays where none does.

    labels: int16 [P, 4], what `patch_labels` gave. An answer that is one word (a colour, a count) has one position.
    """
    if query.mark >= 0:
        mark = scene.marks[query.mark]
        scale_x, scale_y = plan.width / scene.image.shape[1], plan.height / scene.image.shape[0]
        box = (mark.x * scale_x, mark.y * scale_y, (mark.x + mark.w) * scale_x, (mark.y + mark.h) * scale_y)
        columns = plan.grid_thw[2] // 2
        cells = _overlaps(box, plan.grid_thw[1], plan.grid_thw[2])
        found = {r // 2 * columns + c // 2 for r, c, area in cells if area / PATCH**2 >= 0.4}
        return [np.array(sorted(found), np.int64)]
    in_field = (labels[:, 1] == _KEY[query.key]) & (labels[:, 0] > 0)
    return [np.unique(np.flatnonzero(in_field & (labels[:, 2] == slot + 1)) // 4) for slot in range(len(query.answer))]


def _overlaps(box: tuple[float, float, float, float], rows: int, columns: int) -> list[tuple[int, int, float]]:
    """(row, column, shared area in square pixels) of every patch that a box touches."""
    x0, y0, x1, y1 = box
    found = []
    for r in range(int(y0 // PATCH), min(rows, int(y1 // PATCH) + 1)):
        tall = min(y1, (r + 1) * PATCH) - max(y0, r * PATCH)
        for c in range(int(x0 // PATCH), min(columns, int(x1 // PATCH) + 1)):
            wide = min(x1, (c + 1) * PATCH) - max(x0, c * PATCH)
            if tall > 0 and wide > 0:
                found.append((r, c, tall * wide))
    return found


def _merge_order(grid: np.ndarray) -> np.ndarray:
    """[rows, columns] -> [P], each 2x2 group of patches consecutive."""
    rows, columns = grid.shape
    return grid.reshape(rows // 2, 2, columns // 2, 2).transpose(0, 2, 1, 3).reshape(-1)
