"""Which view of an image the model gets: its size in pixels and the part of the image it shows. Standard library only.

Sizes follow the Qwen2-VL processor, which is Qwen3-VL's too: both sides multiples of a visual token's, which is two
patches: 28 pixels (patches of 14), or 32 (of 16, Qwen3-VL).
`fit` repeats the processor's arithmetic operation by operation, IEEE doubles and round-half-even included, because an
exact integer form differs from it at some boundaries. All the rest is integer arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from vtengine.vision.errors import ImageError

PATCH = 14  # pixels per side of one vision-tower row, where a checkpoint's processor does not say otherwise
PATCHES = (14, 16)
MERGE = 2  # vision-tower rows per side of one visual token
MAX_ASPECT = 200  # long side / short side; the Qwen2-VL processor refuses more

LowView = Literal["one_resize", "half_first"]  # see plan_low and plan_low_half_first
ResizeMode = Literal["pil13", "pil12", "tv"]  # whose arithmetic: Pillow from 13 on, Pillow before, torchvision
LOW_VIEWS: tuple[LowView, ...] = ("one_resize", "half_first")
RESIZE_MODES: tuple[ResizeMode, ...] = ("pil13", "pil12", "tv")
Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom exclusive


@dataclass(frozen=True)
class PixelLimits:
    """Area of the high view in pixels, and the side of a patch. The defaults are Qwen2.5-VL's: 4 to 16,384 visual
    tokens."""

    min_pixels: int = 3136
    max_pixels: int = 12845056
    patch: int = PATCH

    def __post_init__(self) -> None:
        if self.patch not in PATCHES:
            raise ValueError(f"limits.patch = {self.patch}: must be one of {', '.join(map(str, PATCHES))} pixels")
        if self.min_pixels < 1:
            raise ValueError(f"limits.min_pixels = {self.min_pixels}: must be >= 1")
        least = max(self.min_pixels, self.token**2)
        if self.max_pixels < least:
            raise ValueError(f"limits.max_pixels = {self.max_pixels}: must be >= {least} (min_pixels and one token)")

    @property
    def token(self) -> int:
        """Pixels per side of one visual token."""
        return MERGE * self.patch


QWEN3_LIMITS = PixelLimits(65536, 16777216, 16)
"""Those of the released Qwen3-VL checkpoints: 64 to 16,384 visual tokens."""


@dataclass(frozen=True)
class ViewPlan:
    """The part `source_box` of the image (original pixels; None = all of it), resized to height x width pixels.

    half: (height, width) of a Lanczos resize that comes first; None: there is only one resize.
    """

    source_box: Box | None
    height: int
    width: int
    half: tuple[int, int] | None = None
    patch: int = PATCH

    def __post_init__(self) -> None:
        for name, value in (("height", self.height), ("width", self.width)):
            if value < self.token or value % self.token:
                raise ValueError(f"view.{name} = {value}: must be a positive multiple of {self.token} pixels")

    @property
    def token(self) -> int:
        """Pixels per side of one visual token."""
        return MERGE * self.patch

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Vision-tower rows: (frames, rows, columns) of patches."""
        return 1, self.height // self.patch, self.width // self.patch

    @property
    def visual_tokens(self) -> int:
        return self.height * self.width // self.token**2


def plan_high(width: int, height: int, limits: PixelLimits) -> ViewPlan:
    """The whole image at the size the Qwen2-VL processor gives it. ImageError `image_aspect_ratio` past 200:1."""
    if width < 1 or height < 1:
        raise ValueError(f"image size = {width}x{height}: both sides must be >= 1 pixel")
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ImageError(
            "image_aspect_ratio",
            f"image of {width}x{height} pixels: the long side may be at most {MAX_ASPECT} times the short one; "
            "crop or pad the image",
        )
    return ViewPlan(None, *fit(height, width, limits), patch=limits.patch)


def plan_low(high: ViewPlan) -> ViewPlan:
    """Half of each side of the high view, rounded to whole visual tokens (half to even), at least one."""
    return plan_scale(high, Fraction(1, 2))


def plan_low_half_first(width: int, height: int, limits: PixelLimits) -> ViewPlan:
    """The low view that the released VisionThink weights know: the image halved by a resize of its own (each side at
    least a visual token's), and what the Qwen2-VL processor then makes of that."""
    half = max(limits.token, height // 2), max(limits.token, width // 2)
    return ViewPlan(None, *fit(*half, limits), half, limits.patch)


def plan_scale(high: ViewPlan, scale: Fraction) -> ViewPlan:
    """`scale` of each side of the high view, 0 < scale <= 1, rounded to whole visual tokens (half to even)."""
    if not 0 < scale <= 1:
        raise ValueError(f"view.scale = {scale}: must be in (0, 1], 1 being the high view")
    token = high.token
    height, width = (max(1, round(Fraction(side // token) * scale)) * token for side in (high.height, high.width))
    return ViewPlan(high.source_box, height, width, patch=high.patch)


def plan_crop(width: int, height: int, low: ViewPlan, box: Box, limits: PixelLimits) -> ViewPlan:
    """The part of a width x height image under `box`, at the pixel density of its high view.

    box: low-view pixels. It is cut to the low view, mapped outwards to whole original pixels, and grown about its
    middle where it has fewer original pixels per side than a token, or is narrower than 1:200. ImageError
    `image_bad_box` if it holds no pixel of the low view. A box that covers the whole image gives the high view itself.
    """
    left, top, right, bottom = box
    if not (max(left, 0) < min(right, low.width) and max(top, 0) < min(bottom, low.height)):
        raise ImageError(
            "image_bad_box",
            f"crop box {list(box)}: must be [left, top, right, bottom] with left < right and top < bottom, "
            f"inside the {low.width}x{low.height} view",
        )
    x = _to_original(left, right, low.width, width)
    y = _to_original(top, bottom, low.height, height)
    longest = max(x[1] - x[0], y[1] - y[0])
    least = max(limits.token, -(-longest // MAX_ASPECT))
    x, y = _grow(*x, least, width), _grow(*y, least, height)
    high = plan_high(width, height, limits)
    if (x, y) == ((0, width), (0, height)):
        return high
    target_height = _scaled(y[1] - y[0], high.height, height)
    target_width = _scaled(x[1] - x[0], high.width, width)
    return ViewPlan((x[0], y[0], x[1], y[1]), *fit(target_height, target_width, limits), patch=limits.patch)


def fit(height: int, width: int, limits: PixelLimits) -> tuple[int, int]:
    """(height, width) of whole tokens, with an area within the limits: the processor's `smart_resize`, unchecked."""
    token = limits.token
    rounded = round(height / token) * token, round(width / token) * token
    area = rounded[0] * rounded[1]
    if area > limits.max_pixels:
        beta = math.sqrt((height * width) / limits.max_pixels)
        return (
            max(token, math.floor(height / beta / token) * token),
            max(token, math.floor(width / beta / token) * token),
        )
    if area < limits.min_pixels:
        beta = math.sqrt(limits.min_pixels / (height * width))
        return math.ceil(height * beta / token) * token, math.ceil(width * beta / token) * token
    return rounded


def _to_original(start: int, stop: int, view_side: int, side: int) -> tuple[int, int]:
    """A non-empty range of view pixels as the smallest range of original pixels that covers it."""
    start, stop = max(start, 0), min(stop, view_side)
    return start * side // view_side, -(-stop * side // view_side)


def _grow(start: int, stop: int, least: int, side: int) -> tuple[int, int]:
    """The range, widened about its middle to `least` pixels and moved to stay in 0..side."""
    size = min(max(stop - start, least), side)
    start = min(max(start - (size - (stop - start)) // 2, 0), side - size)
    return start, start + size


def _scaled(part: int, view_side: int, side: int) -> int:
    """`part` original pixels in pixels of a view of the whole side: the nearest integer, at least 1."""
    return max(1, (2 * part * view_side + side) // (2 * side))
