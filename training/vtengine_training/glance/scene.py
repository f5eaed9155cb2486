"""What a generated picture is: its pixels, the glyphs and marks on it, and the questions it answers.

Coordinates are pixels of the original image, `x, y` the upper left corner. The layout is kept because training uses
it twice: as dense supervision (which character, which field, which object lies under each patch), and to know
whether a question can be answered from the low view at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DIGITS = "0123456789"
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # no I, O, Q: too close to 1 and 0 in a seven-pixel glyph
CHARS = DIGITS + "ABCDEFGHIJKLMNOPQRSTUVWXYZ."
KINDS = ("note", "label", "receipt", "table", "bars", "meter", "shapes")
COLOURS = {
    "red": (208, 32, 38),
    "green": (22, 140, 50),
    "blue": (34, 72, 214),
    "yellow": (236, 196, 20),
    "purple": (140, 44, 168),
    "black": (26, 26, 30),
}
SHAPES = ("circle", "square", "triangle", "star")
ITEMS = ("TEA", "PIE", "EGG", "JAM", "HAM", "NUT", "FIG", "SYR")
WORDS = ("BOX", "BAG", "CAN", "JAR", "TIN", "CUP", "PEN", "KEY")
BARS = "ABCDE"
TABLE_ROWS = "ABCD"
TABLE_COLUMNS = "123"

NO_FIELD = "?"
"""Key of glyphs that belong to no field anyone asks for: dense labels skip their key and slot."""

LOW_READABLE = 8.0
"""Cap height in low-view pixels from which a glyph counts as answerable in the low view."""
LOW_UNREADABLE = 4.0
"""Cap height in low-view pixels up to which it does not; nothing is generated between the two."""


@dataclass(frozen=True)
class Glyph:
    """One drawn character: its ink box, the cap height of its line, and the field (`key`, position `slot`) it is in."""

    char: str
    x: int
    y: int
    w: int
    h: int
    cap: int
    key: str = ""
    slot: int = 0


@dataclass(frozen=True)
class Mark:
    """One drawn object: what it is (`square`, `bar`), its colour name, its box, its number among its own kind."""

    shape: str
    colour: str
    x: int
    y: int
    w: int
    h: int
    ordinal: int = 0


@dataclass(frozen=True)
class Query:
    """A question with its answer. `form` says what answers look like: `d` digit, `L` letter, or `a|b|c` a choice.

    `key` names the field whose glyphs hold the answer, "" where no glyph has to be read.
    """

    question: str
    answer: str
    form: str
    key: str
    cap: int | None
    """Cap height in original pixels of the glyphs that must be read; None where none must."""
    mark: int = -1
    """Number of the mark that shows the answer, where no glyph does."""


@dataclass(frozen=True)
class Scene:
    """One picture (`image` uint8 [H, W, 3]) with everything that is known about it."""

    kind: str
    image: np.ndarray
    glyphs: tuple[Glyph, ...]
    marks: tuple[Mark, ...]
    queries: tuple[Query, ...]


def needs_high(query: Query, low_scale: float) -> bool:
    """Whether `query` needs the high view, `low_scale` being low-view pixels per original pixel (the smaller side's).

    Raises ValueError for a glyph height in the gap, which the generator must not produce.
    """
    if query.cap is None:
        return False
    cap = query.cap * low_scale
    if cap >= LOW_READABLE:
        return False
    if cap <= LOW_UNREADABLE:
        return True
    raise ValueError(f"cap height {cap:.2f} low-view pixels: between {LOW_UNREADABLE} and {LOW_READABLE}, no label")
