"""Images of episodes as data URLs, at the sizes that the model was given.

Nothing is fetched from a network. The page has a budget in bytes: past it a view keeps its caption but no picture.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtengine.protocol.messages import View as AskedView
from vtengine.protocol.messages import ViewSize
from vtengine.protocol.reply import parse_reply
from vtengine.vision.errors import ImageError
from vtengine.vision.plan import (
    PATCH,
    PATCHES,
    QWEN3_LIMITS,
    PixelLimits,
    ViewPlan,
    plan_crop,
    plan_high,
    plan_low,
)

if TYPE_CHECKING:
    import numpy as np

Size = tuple[int, int]  # width, height in pixels
MAX_SIDE = 1280  # pixels; larger views are embedded at this size, their caption tells the true one
QUALITY = 82
FULL = "left out: the page has reached its size limit"
NUM_DECODED = 8  # images whose pixels are kept for the rows that follow


@dataclass(frozen=True)
class View:
    """One picture of an episode. `key`: of its data URL, None when there is none, and then `note` says why."""

    name: str
    width: int
    height: int
    visual_tokens: int
    shown: bool
    key: str | None
    note: str | None


class PictureBook:
    """Decodes each image once while its rows are near, and gives every picture one key.

    Images are read below `root`; when that is None, from `image_path` of the row, relative to `rows_folder`.
    `fresh` collects the data URLs that were made since it was last emptied, for the caller to write out.
    """

    def __init__(self, rows_folder: Path, root: Path | None, budget_bytes: int) -> None:
        self._rows_folder = rows_folder
        self._root = root
        self._left_bytes = budget_bytes
        self._is_full = False
        self._keys: dict[tuple[str, ViewPlan], str] = {}
        self._decoded: dict[str, np.ndarray | str] = {}
        self.fresh: dict[str, str] = {}

    def views(self, row: Mapping[str, Any]) -> list[View]:
        """The low and the high view first, then any other the model saw; `shown` tells which ones it saw."""
        source, root = self._place(row)
        if source is None:
            return []
        shown, patch = _shown_views(row), _patch(row)
        pixels = FULL if self._is_full else self._pixels(source, root)
        if isinstance(pixels, str):
            return [View("shown", *size, ViewSize(*size, patch).visual_tokens, True, None, pixels) for size, _ in shown]
        height, width = pixels.shape[:2]
        try:
            limits = _limits(width, height, row.get("visual_tokens_full"), patch)
            high = plan_high(width, height, limits)
        except (ImageError, ValueError) as error:
            return [View("whole", width, height, 0, False, None, " ".join(str(error).split()))]
        low = plan_low(high)
        views: dict[tuple[str, Size, ViewPlan | None], bool] = {
            (name, (plan.width, plan.height), plan): False for name, plan in (("low", low), ("high", high))
        }
        for size, asked in shown:
            name, plan = _plan_of(asked, size, (width, height), low, high, limits)
            views[(name, size, plan)] = True
        return [
            self._view(source, pixels, *view, ViewSize(*view[1], patch).visual_tokens, seen)
            for view, seen in views.items()
        ]

    def _place(self, row: Mapping[str, Any]) -> tuple[str | None, Path]:
        """The image source of a row, and the folder that it may be read from."""
        image, recorded = row.get("image"), row.get("image_path")
        if not isinstance(image, str):
            return None, Path()
        if image[:5].lower() == "data:":
            return image, self._rows_folder
        if self._root is not None or not isinstance(recorded, str):
            return image, self._root or self._rows_folder
        try:
            path = self._rows_folder.joinpath(recorded).resolve()
        except (OSError, ValueError):  # no path at all: reading it will say so
            return recorded, self._rows_folder
        return str(path), path.parent

    def _view(
        self, source: str, pixels: np.ndarray, name: str, size: Size, plan: ViewPlan | None, tokens: int, shown: bool
    ) -> View:
        if plan is None:
            return View(name, *size, tokens, shown, None, "a view that the record does not describe")
        key = self._keys.get((_short(source), plan))
        if key is None:
            url = encode(pixels, plan)
            if len(url) > self._left_bytes:
                self._is_full = True
                return View(name, *size, tokens, shown, None, FULL)
            self._left_bytes -= len(url)
            key = f"p{len(self._keys)}"
            self._keys[(_short(source), plan)] = key
            self.fresh[key] = url
        return View(name, *size, tokens, shown, key, None)

    def _pixels(self, source: str, root: Path) -> np.ndarray | str:
        """The decoded image, or one line that says why there is none."""
        name = _short(source)
        if name not in self._decoded:
            while len(self._decoded) >= NUM_DECODED:
                self._decoded.pop(next(iter(self._decoded)))
            self._decoded[name] = _read(source, root)
        return self._decoded[name]


def encode(pixels: np.ndarray, plan: ViewPlan) -> str:
    """The view of uint8 [H, W, 3] pixels (at most MAX_SIDE on the longer side) as a WebP data URL."""
    from PIL import Image

    factor = min(1.0, MAX_SIDE / max(plan.width, plan.height))
    size = max(1, round(plan.width * factor)), max(1, round(plan.height * factor))
    buffer = io.BytesIO()
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box=plan.source_box)
    image.save(buffer, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _read(source: str, root: Path) -> np.ndarray | str:
    from vtengine.vision.decode import DecodeLimits, decode_image
    from vtengine.vision.source import read_image_source

    try:
        return decode_image(read_image_source(source, root), DecodeLimits())
    except (ImageError, OSError, ValueError) as error:
        return " ".join(str(error).split())


def _limits(width: int, height: int, visual_tokens_full: Any, patch: int) -> PixelLimits:
    """The default limits, or those under which the high view has the token count of the record."""
    default = QWEN3_LIMITS if patch == QWEN3_LIMITS.patch else PixelLimits()
    high = plan_high(width, height, default)
    if isinstance(visual_tokens_full, int) and 0 < visual_tokens_full < high.visual_tokens:
        pixels = default.token**2
        return replace(default, min_pixels=pixels, max_pixels=visual_tokens_full * pixels)
    return default


def _plan_of(
    asked: AskedView | None, size: Size, whole: Size, low: ViewPlan, high: ViewPlan, limits: PixelLimits
) -> tuple[str, ViewPlan | None]:
    """Name and plan of a view that was shown; no plan when what was asked for does not explain its size.

    A view of the whole image is told by its size alone: what was asked for may have been bounded by the run.
    """
    if asked is not None and asked.box is not None:
        try:
            plan = plan_crop(*whole, low, asked.box, limits)
        except ValueError:
            return "other", None
        return ("crop", plan) if (plan.width, plan.height) == size else ("other", None)
    for name, standard in (("low", low), ("high", high)):
        if (standard.width, standard.height) == size:
            return name, standard
    if low.width <= size[0] <= high.width and low.height <= size[1] <= high.height:
        return "scaled", ViewPlan(high.source_box, size[1], size[0], patch=high.patch)
    return "other", None


def _shown_views(row: Mapping[str, Any]) -> list[tuple[Size, AskedView | None]]:
    """(width, height) of each image in the turns, in order, and what the turn before asked for."""
    views: list[tuple[Size, AskedView | None]] = []
    asked: AskedView | None = None
    recorded = row.get("turns")
    turns = recorded if isinstance(recorded, list) else []
    for turn in turns:
        if not isinstance(turn, Mapping):
            continue
        images = turn.get("images")
        for image in images if isinstance(images, list) else []:
            size = _size(image) if isinstance(image, Mapping) else None
            if size is not None:
                views.append((size, asked))
        asked = _asked_view(turn)
    return views


def _asked_view(turn: Mapping[str, Any]) -> AskedView | None:
    text = turn.get("text")
    if not isinstance(text, str) or not turn.get("action"):
        return None
    call = parse_reply(text).call
    return None if call is None else call.view


def _size(image: Mapping[str, Any]) -> Size | None:
    """(width, height) of a view in a record, None when they are no pixel counts of a view."""
    width, height = image.get("width"), image.get("height")
    if not (isinstance(width, int) and isinstance(height, int)):
        return None
    patch = _patch_of(image)
    sides = (width, height)
    return (width, height) if all(0 < side < 2**20 and side % (2 * patch) == 0 for side in sides) else None


def _patch(row: Mapping[str, Any]) -> int:
    """Pixels per side of a patch of the model that saw the row's views."""
    recorded = row.get("turns")
    for turn in recorded if isinstance(recorded, list) else []:
        images = turn.get("images") if isinstance(turn, Mapping) else None
        for image in images if isinstance(images, list) else []:
            if isinstance(image, Mapping):
                return _patch_of(image)
    return PATCH


def _patch_of(image: Mapping[str, Any]) -> int:
    """Told by how many visual tokens a view of its size has."""
    width, height, tokens = image.get("width"), image.get("height"), image.get("visual_tokens")
    if not (isinstance(width, int) and isinstance(height, int) and isinstance(tokens, int)):
        return PATCH
    return next((patch for patch in PATCHES if width * height == tokens * (2 * patch) ** 2), PATCH)


def _short(source: str) -> str:
    """A key for a source; data URLs are long."""
    return hashlib.sha256(source.encode()).hexdigest() if len(source) > 512 else source
