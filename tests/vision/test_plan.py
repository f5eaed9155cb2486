"""Plans: the processor's sizes exactly, and views that stay inside the image and the limits."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtengine.vision.errors import ImageError
from vtengine.vision.plan import (
    PATCHES,
    QWEN3_LIMITS,
    PixelLimits,
    ViewPlan,
    plan_crop,
    plan_high,
    plan_low,
    plan_low_half_first,
    plan_scale,
)

SIDES = st.integers(1, 8192)
LIMITS = st.builds(
    lambda least, more, patch: PixelLimits(least, max(4 * patch * patch, least + more), patch),
    st.integers(1, 1 << 20),
    st.integers(0, 1 << 24),
    st.sampled_from(PATCHES),
)
DEFAULT = PixelLimits()


@pytest.fixture(scope="module")
def smart_resize():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    return module.smart_resize


def assert_like_processor(smart_resize, width: int, height: int, limits: PixelLimits) -> None:
    try:
        expected = smart_resize(height, width, limits.token, limits.min_pixels, limits.max_pixels)
    except ValueError:
        with pytest.raises(ImageError) as caught:
            plan_high(width, height, limits)
        assert caught.value.code == "image_aspect_ratio"
        return
    plan = plan_high(width, height, limits)
    assert (plan.height, plan.width) == expected
    assert plan.grid_thw == (1, expected[0] // limits.patch, expected[1] // limits.patch)
    assert plan.visual_tokens == expected[0] * expected[1] // limits.token**2


@pytest.mark.parametrize(
    ("width", "height"),
    [
        *((1, 1), (28, 28), (1, 20000), (20000, 1), (8192, 8192), (1, 200), (1, 201), (14, 14), (42, 42), (13, 15)),
        *((200 * 28, 28), (14, 2800), (10, 2000), (41, 8192), (8192, 41), (70, 98), (400, 100), (2048, 1024)),
    ],
)
def test_high_equals_the_processor_at_fixed_sizes(smart_resize, width: int, height: int) -> None:
    assert_like_processor(smart_resize, width, height, DEFAULT)
    assert_like_processor(smart_resize, width, height, PixelLimits(262144, 4194304))
    assert_like_processor(smart_resize, width, height, QWEN3_LIMITS)


@settings(max_examples=1000)
@given(SIDES, SIDES, st.one_of(st.just(DEFAULT), LIMITS))
def test_high_equals_the_processor(smart_resize, width: int, height: int, limits: PixelLimits) -> None:
    assert_like_processor(smart_resize, width, height, limits)


@settings(max_examples=1000)
@given(st.integers(1, 292), st.integers(1, 292), st.sampled_from([-15, -14, -13, -1, 0, 1, 13, 14, 15]))
def test_high_equals_the_processor_at_rounding_boundaries(smart_resize, rows: int, columns: int, off: int) -> None:
    assert_like_processor(smart_resize, max(1, columns * 28 + off), max(1, rows * 28 + off), DEFAULT)
    assert_like_processor(smart_resize, max(1, columns * 32 + off), max(1, rows * 32 + off), QWEN3_LIMITS)


@given(SIDES, SIDES, LIMITS)
def test_low_is_half_of_each_side(width: int, height: int, limits: PixelLimits) -> None:
    try:
        high = plan_high(width, height, limits)
    except ImageError:
        return
    low = plan_low(high)
    token = limits.token
    assert (low.height, low.width) == tuple(max(token, round(s / 2 / token) * token) for s in (high.height, high.width))
    assert low.source_box is None and plan_scale(high, Fraction(1)) == high


@pytest.mark.parametrize(("side", "half"), [(28, 28), (56, 28), (84, 56), (112, 56), (140, 56), (196, 112)])
def test_low_rounds_half_to_even(side: int, half: int) -> None:
    assert plan_low(ViewPlan(None, side, side)) == ViewPlan(None, half, half)


@pytest.mark.parametrize("scale", [Fraction(0), Fraction(-1, 2), Fraction(3, 2)])
def test_scale_out_of_range_names_the_range(scale: Fraction) -> None:
    with pytest.raises(ValueError, match=r"view.scale = .*\(0, 1\]"):
        plan_scale(ViewPlan(None, 56, 56), scale)


@settings(max_examples=500)
@given(st.data(), st.integers(1, 8192), st.integers(1, 8192), st.one_of(st.just(DEFAULT), LIMITS))
def test_crop_covers_its_box_inside_the_image(data, width: int, height: int, limits: PixelLimits) -> None:
    try:
        high = plan_high(width, height, limits)
    except ImageError:
        return
    low = plan_low(high)
    left, right = sorted(data.draw(st.lists(st.integers(0, low.width), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(data.draw(st.lists(st.integers(0, low.height), min_size=2, max_size=2, unique=True)))
    crop = plan_crop(width, height, low, (left, top, right, bottom), limits)
    if crop.source_box is None:
        assert crop == high
        return
    x0, y0, x1, y1 = crop.source_box
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    token = limits.token
    assert x1 - x0 >= min(token, width) and y1 - y0 >= min(token, height)
    assert max(x1 - x0, y1 - y0) <= 200 * min(x1 - x0, y1 - y0)
    assert x0 * low.width <= left * width and x1 * low.width >= right * width
    assert y0 * low.height <= top * height and y1 * low.height >= bottom * height
    assert crop.height % token == 0 and crop.width % token == 0
    if crop.height > token and crop.width > token:
        assert crop.height * crop.width <= max(limits.max_pixels, 4 * limits.min_pixels + 4 * token**2 * 200)


def test_crop_keeps_the_density_of_the_high_view() -> None:
    limits = PixelLimits(3136, 1120 * 840)
    high = plan_high(4480, 3360, limits)
    low = plan_low(high)
    assert (high.width, high.height, low.width, low.height) == (1120, 840, 560, 420)
    crop = plan_crop(4480, 3360, low, (140, 140, 420, 280), limits)
    assert crop == ViewPlan((1120, 1120, 3360, 2240), 280, 560)


def test_crop_grows_a_tiny_box_and_cuts_a_wide_one() -> None:
    high = plan_high(1120, 840, DEFAULT)
    low = plan_low(high)
    assert plan_crop(1120, 840, low, (0, 0, 1, 1), DEFAULT).source_box == (0, 0, 28, 28)
    assert plan_crop(1120, 840, low, (559, 419, 900, 900), DEFAULT).source_box == (1092, 812, 1120, 840)
    assert plan_crop(1120, 840, low, (-5, -5, 9999, 9999), DEFAULT) == high
    assert plan_crop(1, 1, plan_low(plan_high(1, 1, DEFAULT)), (3, 3, 4, 4), DEFAULT) == plan_high(1, 1, DEFAULT)


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (9, 5, 5, 9), (5, 9, 9, 5), (560, 0, 600, 9), (-9, 0, 0, 9)])
def test_crop_of_no_pixel_is_an_error(box: tuple[int, int, int, int]) -> None:
    low = plan_low(plan_high(1120, 840, DEFAULT))
    with pytest.raises(ImageError, match="560x420") as caught:
        plan_crop(1120, 840, low, box, DEFAULT)
    assert caught.value.code == "image_bad_box"


@pytest.mark.parametrize(("least", "most"), [(0, 784), (3136, 783), (4000, 3999)])
def test_limits_that_contradict_are_refused(least: int, most: int) -> None:
    with pytest.raises(ValueError, match=r"limits\.m(in|ax)_pixels = "):
        PixelLimits(least, most)


def test_a_patch_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"limits\.patch = 15: must be one of 14, 16"):
        PixelLimits(patch=15)
    with pytest.raises(ValueError, match="max_pixels = 1000: must be >= 1024"):
        PixelLimits(784, 1000, 16)


@pytest.mark.parametrize(("height", "width"), [(0, 28), (28, 27), (-28, 28)])
def test_a_view_is_whole_tokens(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="multiple of 28"):
        ViewPlan(None, height, width)
    with pytest.raises(ValueError, match="multiple of 32"):
        ViewPlan(None, 32, 28, patch=16)


def test_plan_imports_the_standard_library_only() -> None:
    code = "import sys, vtengine.vision.plan; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert shown.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("size", "half", "view"),
    [
        ((1024, 768), (384, 512), (392, 504)),
        ((1023, 769), (384, 511), (392, 504)),
        ((40, 2000), (1000, 28), (1008, 28)),
        ((1, 1), (28, 28), (56, 56)),
    ],
    ids=str,
)
def test_the_low_view_of_a_halved_image(size: tuple[int, int], half: tuple[int, int], view: tuple[int, int]) -> None:
    assert plan_low_half_first(*size, DEFAULT) == ViewPlan(None, *view, half)
