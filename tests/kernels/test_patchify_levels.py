"""The resized image, level by level, against Pillow and against torch: no difference is allowed."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from vtengine_kernels.patchify import Step, Target
from vtengine_kernels.patchify.contract import PATCHES
from vtengine_kernels.patchify.fixed_point import vertical_first

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
MODES = ["pil13", "pil12", "tv"]
PILLOW = "pil13" if int(PIL.__version__.split(".")[0]) >= 13 else "pil12"
IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "layout": "compact"}
EXTREMES = [
    ((1, 1), (28, 28)),
    ((1, 1), (280, 28)),
    ((28, 28), (28, 28)),
    ((1, 4000), (28, 5600)),
    ((4000, 1), (5600, 28)),
    ((2000, 3), (28, 28)),
    ((3, 2000), (28, 28)),
    ((1500, 1400), (28, 28)),  # more than 100 taps both ways
    ((56, 84), (56, 84)),
    ((56, 85), (56, 84)),
    ((57, 84), (56, 84)),
    ((27, 29), (28, 28)),
    ((300, 200), (28, 1400)),  # up in one direction, down in the other
    ((200, 300), (1400, 28)),
    ((768, 1024), (756, 1036)),  # Pillow 13 resamples the columns first
    ((470, 470), (476, 476)),
]


def levels_of(rows: torch.Tensor, height: int, width: int, patch: int = 14) -> np.ndarray:
    """uint8 [height, width, 3] from compact rows that hold level / 255."""
    levels = (rows.double() * 255).round().to(torch.uint8).numpy()
    windows = levels.reshape(height // patch // 2, width // patch // 2, 2, 2, 3, patch, patch)
    return windows.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height, width, 3)


def resized(image: np.ndarray, height: int, width: int, kind: str, mode: str) -> np.ndarray:
    """By Pillow, the two passes as two calls, which fixes their order whatever its version; "tv": by torch."""
    if mode == "tv":
        return torch_resized(image, height, width, kind)
    pixels, resample = Image.fromarray(image), FILTERS[kind]
    if vertical_first(image.shape[0], image.shape[1], height, width, mode):
        return np.asarray(pixels.resize((pixels.width, height), resample).resize((width, height), resample))
    return np.asarray(pixels.resize((width, pixels.height), resample).resize((width, height), resample))


def torch_resized(image: np.ndarray, height: int, width: int, kind: str) -> np.ndarray:
    """What torchvision calls for 8-bit tensors. A size that stays is left alone there."""
    planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    if image.shape[:2] == (height, width):
        return image
    try:
        made = torch.nn.functional.interpolate(
            planes, size=(height, width), mode=kind, antialias=True, align_corners=False
        )
    except (NotImplementedError, ValueError):
        pytest.skip(f"torch {torch.__version__} has no 8-bit {kind}")
    return made[0].permute(1, 2, 0).numpy()


def differing(run, image, height, width, kind, mode, before=(), patch=14, **options) -> int:
    targets = [Target(height, width, before=before)]
    rows = run(image, targets, filter=kind, mode=mode, patch=patch, **IDENTITY, **options)[0]
    for step in before:
        image = resized(image, step.height, step.width, step.filter, mode)
    return int((levels_of(rows, height, width, patch) != resized(image, height, width, kind, mode)).sum())


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("size", EXTREMES, ids=str)
def test_extreme_sizes(run, picture, kind, size):
    (height_in, width_in), (height, width) = size
    image = picture(height_in, width_in)
    rows = run(image, [Target(height, width)], filter=kind, mode=PILLOW, **IDENTITY)[0]
    whole = np.asarray(Image.fromarray(image).resize((width, height), FILTERS[kind]))
    assert (levels_of(rows, height, width) != whole).sum() == 0
    assert differing(run, image, height, width, kind, "tv") == 0


def wrong_sizes(run, picture, kind: str, mode: str, count: int, halved: bool = False) -> list[tuple]:
    """Of `count` random sizes, those with a difference; both patches, one thread and two, both kinds of stores."""
    rng = np.random.default_rng(7)
    wrong = []
    for index in range(count):
        height_in, width_in = (int(side) for side in rng.integers(1, (40, 200)[index % 2], 2))
        patch = PATCHES[index // 4 % 2]
        height, width = (2 * patch * int(side) for side in rng.integers(1, 6, 2))
        before = (Step(max(1, height_in // 2), max(1, width_in // 2)),) if halved else ()
        options = {"num_threads": 1 + index // 2 % 2, "stream": (None, True, False)[index % 3], "patch": patch}
        off = differing(run, picture(height_in, width_in), height, width, kind, mode, before, **options)
        if off:
            wrong.append((height_in, width_in, height, width, options, off))
    return wrong


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("mode", MODES)
def test_random_sizes(run, picture, kind, mode):
    assert wrong_sizes(run, picture, kind, mode, 60) == []


@pytest.mark.parametrize("mode", MODES)
def test_random_sizes_halved_first(run, picture, mode):
    """VisionThink's low view: half by Lanczos, then bicubic to the grid, 8 bits in between."""
    assert wrong_sizes(run, picture, "bicubic", mode, 60, halved=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("mode", MODES)
def test_500_random_sizes(run, picture, kind, mode):
    assert wrong_sizes(run, picture, kind, mode, 500) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_500_random_sizes_halved_first(run, picture, mode):
    assert wrong_sizes(run, picture, "bicubic", mode, 500, halved=True) == []


@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.integers(1, 20),
    st.integers(1, 20),
    st.lists(st.builds(Step, st.integers(1, 400), st.integers(1, 400), st.sampled_from(sorted(FILTERS))), max_size=2),
    st.sampled_from(sorted(FILTERS)),
    st.sampled_from(MODES),
    st.sampled_from(PATCHES),
    st.integers(1, 3),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_size(compiled, picture, height_in, width_in, rows, columns, before, kind, mode, patch, threads):
    image, size = picture(height_in, width_in), (2 * patch * rows, 2 * patch * columns)
    assert differing(compiled, image, *size, kind, mode, tuple(before), patch, num_threads=threads) == 0


@pytest.mark.parametrize("kind", FILTERS)
def test_many_columns(compiled, picture, kind):
    """Wider than one tile of the vertical pass, with odd remainders."""
    for width in (420, 448, 476, 896, 924, 1400):
        assert differing(compiled, picture(61, width + 13), 56, width, kind, "pil12", num_threads=2) == 0
    for width in (416, 448, 480, 896, 928, 1408):
        assert differing(compiled, picture(61, width + 13), 64, width, kind, "pil12", patch=16, num_threads=2) == 0


def test_photographs(compiled, data_dir):
    files = sorted((data_dir / "photos").rglob("*.jpg"))[:3]
    if not files:
        pytest.skip(f"no photographs under {data_dir}")
    for file in files:
        with Image.open(file) as opened:
            opened.draft("RGB", (1200, 1200))
            image = np.asarray(opened.convert("RGB"))
        height, width = image.shape[0] // 56 * 28 + 28, image.shape[1] // 56 * 28 + 28
        for mode in MODES:
            assert differing(compiled, image, height, width, "bicubic", mode) == 0
