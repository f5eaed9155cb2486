"""Which view of an image the model gets: its size in pixels and the part of the image it shows. Standard library only.

Sizes follow the Qwen2-VL processor: both sides multiples of 28, 28x28 pixels = 1 visual token (patch 14, merge 2).
`fit` repeats the processor's arithmetic operation by operation, IEEE doubles and round-half-even included, because an
exact integer form differs from it at some boundaries. All the rest is integer arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from vtengine.vision.errors import ImageError

FACTOR = 28  # pixels per side of one visual token
PATCH = 14  # pixels per side of one vision-tower row
MAX_ASPECT = 200  # long side / short side; the Qwen2-VL processor refuses more
MIN_CROP = 28  # original pixels per side, where the image has them

LowView = Literal["one_resize", "half_first"]  # see plan_low and plan_low_half_first
ResizeMode = Literal["pil13", "pil12", "tv"]  # whose arithmetic: Pillow from 13 on, Pillow before, torchvision
LOW_VIEWS: tuple[LowView, ...] = ("one_resize", "half_first")
RESIZE_MODES: tuple[ResizeMode, ...] = ("pil13", "pil12", "tv")
Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom exclusive


@dataclass(frozen=True)
class PixelLimits:
    """Area of the high view in pixels. The defaults are Qwen2.5-VL's: 4 to 16,384 visual tokens."""

    min_pixels: int = 3136
    max_pixels: int = 12845056

    def __post_init__(self) -> None:
        if self.min_pixels < 1:
            raise ValueError(f"limits.min_pixels = {self.min_pixels}: must be >= 1")
        if self.max_pixels < max(self.min_pixels, FACTOR * FACTOR):
            least = max(self.min_pixels, FACTOR * FACTOR)
            raise ValueError(f"limits.max_pixels = {self.max_pixels}: must be >= {least} (min_pixels and one token)")


@dataclass(frozen=True)
class ViewPlan:
    """The part `source_box` of the image (original pixels; None = all of it), resized to height x width pixels.

    half: (height, width) of a Lanczos resize that comes first; None: there is only one resize.
    """

    source_box: Box | None
    height: int
    width: int
    half: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, value in (("height", self.height), ("width", self.width)):
            if value < FACTOR or value % FACTOR:
                raise ValueError(f"view.{name} = {value}: must be a positive multiple of {FACTOR} pixels")

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Vision-tower rows: (frames, rows, columns) of 14x14 patches."""
        return 1, self.height // PATCH, self.width // PATCH

    @property
    def visual_tokens(self) -> int:
        return self.height * self.width // (FACTOR * FACTOR)


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
    return ViewPlan(None, *fit(height, width, limits))


def plan_low(high: ViewPlan) -> ViewPlan:
    """Half of each side of the high view, rounded to multiples of 28 (half to even), at least 28."""
    return plan_scale(high, Fraction(1, 2))


def plan_low_half_first(width: int, height: int, limits: PixelLimits) -> ViewPlan:
    """The low view that the released VisionThink weights know: the image halved by a resize of its own (each side at
    least 28), and what the Qwen2-VL processor then makes of that."""
    half = max(FACTOR, height // 2), max(FACTOR, width // 2)
    return ViewPlan(None, *fit(*half, limits), half)


def plan_scale(high: ViewPlan, scale: Fraction) -> ViewPlan:
    """`scale` of each side of the high view, 0 < scale <= 1, rounded to multiples of 28 (half to even), at least 28."""
    if not 0 < scale <= 1:
        raise ValueError(f"view.scale = {scale}: must be in (0, 1], 1 being the high view")
    height, width = (max(1, round(Fraction(side // FACTOR) * scale)) * FACTOR for side in (high.height, high.width))
    return ViewPlan(high.source_box, height, width)


def plan_crop(width: int, height: int, low: ViewPlan, box: Box, limits: PixelLimits) -> ViewPlan:
    """The part of a width x height image under `box`, at the pixel density of its high view.

    box: low-view pixels. It is cut to the low view, mapped outwards to whole original pixels, and grown about its
    middle where it is smaller than 28 original pixels or narrower than 1:200. ImageError `image_bad_box` if it holds
    no pixel of the low view. A box that covers the whole image gives the high view itself.
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
    least = max(MIN_CROP, -(-longest // MAX_ASPECT))
    x, y = _grow(*x, least, width), _grow(*y, least, height)
    high = plan_high(width, height, limits)
    if (x, y) == ((0, width), (0, height)):
        return high
    target_height = _scaled(y[1] - y[0], high.height, height)
    target_width = _scaled(x[1] - x[0], high.width, width)
    return ViewPlan((x[0], y[0], x[1], y[1]), *fit(target_height, target_width, limits))


def fit(height: int, width: int, limits: PixelLimits) -> tuple[int, int]:
    """(height, width) as multiples of 28 with an area within the limits: the processor's `smart_resize`, unchecked."""
    rounded = round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR
    area = rounded[0] * rounded[1]
    if area > limits.max_pixels:
        beta = math.sqrt((height * width) / limits.max_pixels)
        return (
            max(FACTOR, math.floor(height / beta / FACTOR) * FACTOR),
            max(FACTOR, math.floor(width / beta / FACTOR) * FACTOR),
        )
    if area < limits.min_pixels:
        beta = math.sqrt(limits.min_pixels / (height * width))
        return math.ceil(height * beta / FACTOR) * FACTOR, math.ceil(width * beta / FACTOR) * FACTOR
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
