"""The kinds that are drawings: bar charts with values, and coloured shapes. Each function draws one scene."""

from __future__ import annotations

import numpy as np

from vtengine_training.glance.documents import pick_side, place
from vtengine_training.glance.ink import CELL, Canvas, Colour, luminance
from vtengine_training.glance.scene import BARS, COLOURS, LETTERS, SHAPES, Query, Scene


def _paper(rng: np.random.Generator) -> Colour:
    return tuple(int(v) for v in rng.integers(222, 256, 3))


def bars(rng: np.random.Generator) -> Scene:
    """Bars of different heights and colours, each with its letter below and its value above."""
    count = int(rng.integers(2, 5))
    value_scale = "small" if rng.random() < 0.6 else "large"
    letter_scale = "small" if rng.random() < 0.3 else "large"
    cell = CELL[value_scale]
    wide = 56 * count
    width, height = pick_side(rng, wide, 280), 168
    canvas = Canvas(rng, width, height, _paper(rng))
    ink = tuple(int(v) for v in rng.integers(0, 70, 3))
    x, base = place(rng, width, wide, 28), height - 28
    levels = rng.permutation(np.arange(1, 6))[:count]  # distinct, 18 px apart
    colours = [list(COLOURS)[int(i)] for i in rng.permutation(len(COLOURS))[:count]]
    tallest = int(np.argmax(levels))
    queries = []
    canvas.draw.line((x, base, x + wide, base), fill=ink)
    for index in range(count):
        value = int(levels[index]) * 18 + int(rng.integers(-8, 9))
        left, tall = x + 56 * index, round(value * 1.1)
        box = (left + 3, base - tall, left + 40, base)
        canvas.draw.rectangle(box, fill=COLOURS[colours[index]])
        canvas.mark("bar", colours[index], box)
        letter_x = left + (14 if letter_scale == "small" else 0)
        canvas.write(BARS[index], letter_x, base, letter_scale, ink, "tallest" if index == tallest else "bar")
        top = max(0, (base - tall - cell) // cell * cell)
        canvas.write(f"{value:02d}", left + (14 if value_scale == "small" else 0), top, value_scale, ink, BARS[index])
        queries.append(
            Query(f"Value of bar {BARS[index]}?", f"{value:02d}", "dd", BARS[index], canvas.cap(value_scale))
        )
        cap = canvas.cap(letter_scale)
        queries.append(Query(f"What colour is bar {BARS[index]}?", colours[index], "|".join(COLOURS), "", cap, index))
    form = "|".join(BARS[:count])
    queries.append(Query("Which bar is tallest?", BARS[tallest], form, "tallest", canvas.cap(letter_scale)))
    return Scene("bars", canvas.finish(), tuple(canvas.glyphs), tuple(canvas.marks), tuple(queries))


def _outline(shape: str, cx: int, cy: int, r: int) -> list[tuple[float, float]]:
    """Corner points of a shape with its centre and radius; circles are drawn as polygons of 24 corners."""
    corners = {"circle": 24, "square": 4, "triangle": 3, "star": 10}[shape]
    start = np.pi / 4 if shape == "square" else -np.pi / 2
    angles = start + 2 * np.pi * np.arange(corners) / corners
    reach = np.full(corners, r * {"square": 1.2, "triangle": 1.15, "star": 1.15}.get(shape, 1.0))
    if shape == "star":
        reach[1::2] *= 0.45
    return [(cx + d * np.cos(a), cy + d * np.sin(a)) for d, a in zip(reach, angles, strict=True)]


def shapes(rng: np.random.Generator) -> Scene:
    """One to five coloured shapes on a loose grid; a single circle or square carries a letter, large or small."""
    columns, rows = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    canvas = Canvas(rng, 56 * (columns + 1), 56 * (rows + 1), _paper(rng))
    count = int(rng.integers(2, min(5, columns * rows) + 1))
    cells = sorted(int(i) for i in rng.permutation(columns * rows)[:count])
    kinds = [SHAPES[int(i)] for i in rng.integers(0, len(SHAPES), count)]
    total = {shape: kinds.count(shape) for shape in SHAPES}
    last = {shape: index for index, shape in enumerate(kinds)}
    queries = [Query(f"How many {s}s?", str(n), "1|2|3", "", None, last[s]) for s, n in total.items() if 0 < n <= 3]
    shift_x, shift_y = (int(v) * 28 for v in rng.integers(0, 2, 2))
    scale = "small" if rng.random() < 0.6 else "large"
    seen: dict[str, int] = {}
    for cell, shape in zip(cells, kinds, strict=True):
        colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
        cx, cy = cell % columns * 56 + 42 + shift_x, cell // columns * 56 + 42 + shift_y
        r = int(rng.integers(18, 24))
        canvas.draw.polygon(_outline(shape, cx, cy, r), fill=COLOURS[colour])
        seen[shape] = seen.get(shape, 0) + 1
        canvas.mark(shape, colour, (cx - r, cy - r, cx + r, cy + r), seen[shape])
        if total[shape] == 1:
            queries.append(Query(f"What colour is the {shape}?", colour, "|".join(COLOURS), "", None, last[shape]))
            if shape in ("circle", "square"):
                letter = LETTERS[int(rng.integers(len(LETTERS)))]
                ink = (250, 250, 250) if luminance(COLOURS[colour]) < 120 else (10, 10, 10)
                canvas.write(letter, cx - 14, cy - 14, scale, ink, shape)
                queries.append(Query(f"Letter on the {shape}?", letter, "L", shape, canvas.cap(scale)))
    return Scene("shapes", canvas.finish(), tuple(canvas.glyphs), tuple(canvas.marks), tuple(queries))
