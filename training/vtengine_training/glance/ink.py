"""Drawing: fonts, glyph masks, colours, noise, and the canvas that remembers what it drew.

Text is set on a grid: one character per 14 px (small) or per 28 px (large), with a jitter of a few pixels. A small
glyph in the high view and a large glyph in the low view then look alike to the vision tower: about one character
per 14-px patch, which a very small model can learn to read within an hour on one core.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vtengine_training.glance.scene import Glyph, Mark

Colour = tuple[int, ...]
"""Red, green, blue."""
CELL = {"small": 14, "large": 28}
SMALL_CAP = 8
LARGE_CAPS = (16, 17, 18, 19)
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "default",
)


@functools.cache
def _font_folder() -> Path:
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("glance: the DejaVu fonts come with matplotlib, which is missing; pip install matplotlib")
    return Path(next(iter(spec.submodule_search_locations))) / "mpl-data" / "fonts" / "ttf"


def _font(name: str, size: float) -> ImageFont.FreeTypeFont:
    if name == "default":
        font = ImageFont.load_default(size)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise ValueError("glance: this Pillow was built without FreeType; install a wheel of pillow")
        return font
    return ImageFont.truetype(str(_font_folder() / name), size)


@functools.cache
def font_size(name: str, cap: int) -> tuple[float, int]:
    """(size in points, cap height in px): the letter H of this font at most `cap` pixels high, hinting considered."""
    heights = {s / 4: _ink(name, s / 4, "H")[1].size[1] for s in range(4 * cap, 8 * cap)}
    reached = max(h for h in heights.values() if h <= cap)
    sizes = [size for size, height in heights.items() if height == reached]
    return (sizes[-1] if reached < cap else sizes[len(sizes) // 2]), reached


@functools.cache
def _ink(name: str, size: float, char: str) -> tuple[int, Image.Image]:
    """(pixels from the baseline up to the ink's top, ink mask cut to its box) of one character."""
    font = _font(name, size)
    left, top, right, bottom = font.getbbox(char, anchor="ls")
    mask = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))), 0)
    ImageDraw.Draw(mask).text((-left, -top), char, fill=255, font=font, anchor="ls")
    box = mask.point(lambda v: 255 if v > 40 else 0).getbbox() or (0, 0, 1, 1)
    return int(-top - box[1]), mask.crop(box)


@functools.cache
def _noise_bank() -> np.ndarray:
    """int16 [512, 512, 3], standard deviation 64, always the same; scenes take random windows of it."""
    return np.random.default_rng(20260).normal(0, 64, (512, 512, 3)).astype(np.int16)


def luminance(colour: Colour) -> float:
    """Perceived brightness, 0 to 255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def pick_colours(rng: np.random.Generator, contrast: float = 110) -> tuple[Colour, Colour]:
    """(paper, ink) at least `contrast` apart in luminance; mostly dark on light."""
    while True:
        light = tuple(int(v) for v in rng.integers(185, 256, 3))
        dark = tuple(int(v) for v in rng.integers(0, 110, 3))
        if luminance(light) - luminance(dark) >= contrast:
            return (light, dark) if rng.random() < 0.75 else (dark, light)


class Canvas:
    """A picture being drawn. `write` sets text on the grid, `mark` records an object, `finish` adds noise."""

    def __init__(self, rng: np.random.Generator, width: int, height: int, paper: Colour):
        self.rng, self.width, self.height = rng, width, height
        self.image = Image.new("RGB", (width, height), paper)
        self.draw = ImageDraw.Draw(self.image)
        self.glyphs: list[Glyph] = []
        self.marks: list[Mark] = []
        self.font = FONTS[int(rng.integers(len(FONTS)))]
        self.large_cap = int(rng.choice(LARGE_CAPS))

    def cap(self, scale: str) -> int:
        """Cap height in pixels of text of this scale on this canvas."""
        return font_size(self.font, SMALL_CAP if scale == "small" else self.large_cap)[1]

    def write(self, text: str, x: int, y: int, scale: str, ink: Colour, key: str = "") -> None:
        """Set `text` with its first cell's corner at (x, y); spaces skip a cell. Glyphs get (key, slot)."""
        cell, reach = CELL[scale], 2 if scale == "small" else 3
        size, cap = font_size(self.font, SMALL_CAP if scale == "small" else self.large_cap)
        jitter_x, jitter_y = (int(v) for v in self.rng.integers(-reach, reach + 1, 2))
        baseline = y + (cell + cap) // 2 + jitter_y
        slot = 0
        for index, char in enumerate(text):
            if char == " ":
                continue
            rise, mask = _ink(self.font, size, char)
            w, h = mask.size
            left = x + index * cell + (cell - w) // 2 + jitter_x
            left = min(max(left, 0), self.width - w)
            top = min(max(baseline - rise, 0), self.height - h)
            self.image.paste(ink, (left, top, left + w, top + h), mask)
            self.glyphs.append(Glyph(char, left, top, w, h, cap, key, slot))
            slot += 1

    def mark(self, shape: str, colour: str, box: tuple[int, int, int, int], ordinal: int = 0) -> None:
        """Record an object drawn in `box` (x0, y0, x1, y1)."""
        x0, y0, x1, y1 = box
        self.marks.append(Mark(shape, colour, x0, y0, x1 - x0, y1 - y0, ordinal))

    def finish(self) -> np.ndarray:
        """The picture with its noise and a slight light gradient, uint8 [H, W, 3]."""
        array = np.asarray(self.image).astype(np.int16)
        sigma = float(self.rng.choice((0, 3, 6, 9)))
        if sigma:
            top, left = (int(v) for v in self.rng.integers(0, 512 - max(self.width, self.height) + 1, 2))
            window = _noise_bank()[top : top + self.height, left : left + self.width]
            array += (window * np.int16(sigma)) >> 6
        if self.rng.random() < 0.4:
            slope = self.rng.uniform(-18, 18)
            array += np.linspace(-slope, slope, self.width).astype(np.int16)[None, :, None]
        return np.clip(array, 0, 255).astype(np.uint8)
