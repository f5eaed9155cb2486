"""The kinds that are text: notes, labels, receipts, tables, meters. Each function draws one scene."""

from __future__ import annotations

import numpy as np

from vtengine_training.glance.ink import CELL, Canvas, pick_colours
from vtengine_training.glance.scene import DIGITS, ITEMS, LETTERS, TABLE_COLUMNS, TABLE_ROWS, WORDS, Query, Scene

MAX_WIDTH, MAX_HEIGHT, STEP = 280, 224, 56


def pick_side(rng: np.random.Generator, content: int, most: int) -> int:
    """A side in pixels: a multiple of 56 (so that the low view is exactly half) that holds `content`."""
    least = max(112, -(-content // STEP) * STEP)
    return least if rng.random() < 0.6 else min(most, least + STEP)


def place(rng: np.random.Generator, side: int, content: int, cell: int) -> int:
    """A start on the cell grid at which `content` pixels still fit into `side`."""
    return int(rng.integers(0, (side - content) // cell + 1)) * cell


def digits(rng: np.random.Generator, count: int) -> str:
    """`count` random digits."""
    return "".join(DIGITS[int(i)] for i in rng.integers(0, 10, count))


def _scale(rng: np.random.Generator) -> str:
    return "small" if rng.random() < 0.5 else "large"


def note(rng: np.random.Generator) -> Scene:
    """A number written on a sheet, sometimes ruled."""
    scale = _scale(rng)
    cell = CELL[scale]
    number = digits(rng, int(rng.integers(2, 6 if scale == "small" else 5)))
    content = len(number) * cell
    width, height = pick_side(rng, content, 224), pick_side(rng, cell, 168)
    paper, ink = pick_colours(rng)
    canvas = Canvas(rng, width, height, paper)
    if rng.random() < 0.5:
        line = tuple((3 * p + i) // 4 for p, i in zip(paper, ink, strict=True))
        for y in range(27, height, 28):
            canvas.draw.line((0, y, width, y), fill=line)
    canvas.write(number, place(rng, width, content, cell), place(rng, height, cell, cell), scale, ink, "number")
    query = Query("What number is written?", number, "d" * len(number), "number", canvas.cap(scale))
    return Scene("note", canvas.finish(), tuple(canvas.glyphs), tuple(canvas.marks), (query,))


def label(rng: np.random.Generator) -> Scene:
    """A coloured tag with a word and a code, each large or small."""
    scales = _scale(rng), _scale(rng)
    word = WORDS[int(rng.integers(len(WORDS)))]
    code = LETTERS[int(rng.integers(len(LETTERS)))] + digits(rng, 3 if scales[1] == "small" else 2)
    wide = max(len(word) * CELL[scales[0]], len(code) * CELL[scales[1]]) + 28
    width, height = pick_side(rng, wide, 224), pick_side(rng, 84, 168)
    paper, _ = pick_colours(rng)
    tag, ink = pick_colours(rng)
    canvas = Canvas(rng, width, height, paper)
    x, y = place(rng, width, wide, 28), place(rng, height, 84, 28)
    canvas.draw.rounded_rectangle((x + 2, y + 2, x + wide - 3, y + 81), 8, fill=tag, outline=ink)
    lower = y + 56
    for text, scale, top, key in ((word, scales[0], y, "word"), (code, scales[1], lower, "code")):
        content, left = len(text) * CELL[scale], x + (14 if scale == "small" else 0)
        canvas.write(text, left + place(rng, wide - 28, content, CELL[scale]), top, scale, ink, key)
    queries = (
        Query("What is the code?", code, "L" + "d" * (len(code) - 1), "code", canvas.cap(scales[1])),
        Query("What word is on it?", word, "|".join(WORDS), "word", canvas.cap(scales[0])),
    )
    return Scene("label", canvas.finish(), tuple(canvas.glyphs), tuple(canvas.marks), queries)


def receipt(rng: np.random.Generator) -> Scene:
    """Lines of an item and its price."""
    scale = _scale(rng)
    cell = CELL[scale]
    count = int(rng.integers(2, 5 if scale == "small" else 4))
    items = [ITEMS[int(i)] for i in rng.permutation(len(ITEMS))[:count]]
    gap = 1 if scale == "large" else int(rng.integers(1, 3))
    pitch = 2 * cell
    wide, tall = (3 + gap + 4) * cell, count * pitch
    width, height = pick_side(rng, wide, 280), pick_side(rng, tall, 168)
    paper, ink = pick_colours(rng)
    canvas = Canvas(rng, width, height, paper)
    x, y = place(rng, width, wide, cell), place(rng, height, tall, cell)
    queries = []
    for row, item in enumerate(items):
        price = f"{digits(rng, 1)}.{digits(rng, 2)}"
        canvas.write(item, x, y + pitch * row, scale, ink, "item")
        canvas.write(price, x + (3 + gap) * cell, y + pitch * row, scale, ink, item)
        queries.append(Query(f"Price of {item}?", price, "d.dd", item, canvas.cap(scale)))
    return Scene("receipt", canvas.finish(), tuple(canvas.glyphs), tuple(canvas.marks), tuple(queries))


def table(rng: np.random.Generator) -> Scene:
    """Rows A to D, columns 1 to 3, a number of two digits in each cell, sometimes ruled."""
    scale = _scale(rng)
    cell = CELL[scale]
    columns = int(rng.integers(2, 4)) if scale == "small" else 2
    rows = int(rng.integers(2, 5 if scale == "small" else 4))
    pitch = 2 * cell
    wide, tall = (1 + 3 * columns) * cell, (rows + 1) * pitch
    width, height = pick_side(rng, wide, 280), pick_side(rng, tall, 224)
    paper, ink = pick_colours(rng)
    canvas = Canvas(rng, width, height, paper)
    x, y = place(rng, width, wide, cell), place(rng, height, tall, cell)
    if rng.random() < 0.5:
        line = tuple((p + i) // 2 for p, i in zip(paper, ink, strict=True))
        for row in range(1, rows + 1):
            canvas.draw.line((x, y + pitch * row - 1, x + wide, y + pitch * row - 1), fill=line)
    for column in range(columns):
        canvas.write(TABLE_COLUMNS[column], x + (2 + 3 * column) * cell, y, scale, ink, "head")
    queries = []
    for row in range(rows):
        top = y + pitch * (row + 1)
        canvas.write(TABLE_ROWS[row], x, top, scale, ink, "head")
        for column in range(columns):
            value, key = digits(rng, 2), TABLE_ROWS[row] + TABLE_COLUMNS[column]
            canvas.write(value, x + (2 + 3 * column) * cell, top, scale, ink, key)
            question = f"Value in row {TABLE_ROWS[row]}, column {TABLE_COLUMNS[column]}?"
            queries.append(Query(question, value, "dd", key, canvas.cap(scale)))
    return Scene("table", canvas.finish(), tuple(canvas.glyphs), tuple(canvas.marks), tuple(queries))


def meter(rng: np.random.Generator) -> Scene:
    """A round or square case with a window that shows a reading."""
    scale = _scale(rng)
    cell = CELL[scale]
    reading = digits(rng, int(rng.integers(3, 6 if scale == "small" else 5)))
    content = len(reading) * cell
    width, height = pick_side(rng, content + 28, 224), pick_side(rng, 112, 168)
    paper, case = pick_colours(rng, 60)
    canvas = Canvas(rng, width, height, paper)
    edge = int(rng.integers(2, 8))
    outline = canvas.draw.ellipse if rng.random() < 0.5 else canvas.draw.rectangle
    outline((edge, edge, width - edge, height - edge), outline=case, width=int(rng.integers(2, 6)))
    window, ink = pick_colours(rng)
    x, y = ((width - content) // 2 + 7) // cell * cell, (28 + place(rng, height - 56, cell, cell)) // cell * cell
    canvas.draw.rectangle((x - 3, y - 1, x + content + 2, y + cell), fill=window, outline=case)
    canvas.write(reading, x, y, scale, ink, "reading")
    query = Query("What does the meter read?", reading, "d" * len(reading), "reading", canvas.cap(scale))
    return Scene("meter", canvas.finish(), tuple(canvas.glyphs), tuple(canvas.marks), (query,))
