"""The Triton kernels of patchify without a GPU: interpreted in a process of its own, and compiled for three of them."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from vtengine_kernels import triton_runtime
from vtengine_kernels.patchify import CLIP_MEAN, CLIP_STD, HALF, Step, Target, patchify, triton
from vtengine_kernels.patchify.normalise import affine, level_table

from tests.kernels.ahead_of_time import compiled
from tests.kernels.interpreting import run_interpreted

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CASES = {  # (height, width) of the source, target, options
    "one pixel": ((1, 1), Target(28, 28), {}),
    "prime sides": ((53, 61), Target(28, 56), {}),
    "prime sides, torch": ((53, 61), Target(28, 56), {"mode": "tv"}),
    "up": ((19, 17), Target(56, 84), {"filter": "lanczos"}),
    "up and down": ((101, 13), Target(28, 56), {"mode": "pil12"}),
    "columns first": ((67, 50), Target(28, 56), {"mode": "pil13"}),
    "fewer rows than a program's": ((3, 61), Target(28, 56), {}),
    "one column": ((97, 1), Target(56, 28), {}),
    "rows stay": ((28, 43), Target(28, 28), {"layout": "full"}),
    "columns stay": ((47, 56), Target(28, 56), {"layout": "full", "dtype": torch.bfloat16}),
    "nothing to resize": ((28, 56), Target(28, 56), {"dtype": torch.bfloat16}),
    "wider than a block": ((28, 150), Target(28, 140), {}),
    "aligned rows": ((53, 64), Target(28, 56), {}),
    "aligned rows, columns first": ((99, 64), Target(28, 56), {}),
    "many taps": ((340, 36), Target(28, 28), {}),
    "many taps both ways, torch": ((150, 160), Target(28, 28), {"mode": "tv", "filter": "lanczos"}),
    "a box in aligned rows": ((60, 72), Target(28, 28, box=(11, 7, 48, 60)), {}),
    "a box": ((60, 70), Target(28, 28, box=(11, 7, 48, 60)), {}),
    "patches of 16": ((53, 61), Target(32, 96), {"patch": 16}),
    "patches of 16, rows stay": ((64, 43), Target(64, 32), {"patch": 16, "layout": "full", "dtype": torch.bfloat16}),
    "halved first": ((83, 59), Target(28, 28, before=(Step(41, 29),)), {"dtype": torch.bfloat16}),
}
INTERPRETED = """
import json, torch
from tests.kernels.test_patchify_triton import CASES, image_of
from vtengine_kernels.patchify import patchify
for name, (size, target, options) in CASES.items():
    options = {"layout": "compact", **options}
    views = [target, target] if name == "a box" else [target]
    got = patchify(image_of(*size), views, impl="triton", **options)
    want = patchify(image_of(*size), views, impl="ref", **options)
    assert len(got) == len(views)
    assert all(map(torch.equal, got, want)), name
print(json.dumps(list(CASES)))
"""


def image_of(height: int, width: int) -> torch.Tensor:
    """uint8 [height, width, 3], noise with many levels at both ends."""
    noise = torch.randint(-128, 384, (height, width, 3), generator=torch.Generator().manual_seed(height * width))
    return noise.clamp(0, 255).to(torch.uint8)


def test_interpreted_it_equals_the_reference_bit_by_bit() -> None:
    assert run_interpreted(INTERPRETED, timeout_s=240) == list(CASES)


@pytest.mark.skipif(triton_runtime.interpreted(), reason="TRITON_INTERPRET is set")
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("taps", [5, 10])
@pytest.mark.parametrize("patch", [14, 16])
def test_it_compiles_without_spills(tmp_path: Path, record_property, arch: int, taps: int, patch: int) -> None:
    values = {"out_ptr": "*i16", "table_ptr": "*fp32"}
    across, down = {"PATCH": patch, **triton.ACROSS}, {"PATCH": patch, **triton.DOWN_PATCHES}
    kernels = {
        "to units": (triton._across_kernel, {"table_ptr": "*fp32"}, {"TO": "units", **across}),
        "to patches": (triton._across_kernel, values, {"TO": "patches", **across}),
        "down": (triton._down_kernel, {}, triton.DOWN),
        "down to patches": (triton._down_patches_kernel, values, down),
    }
    for name, (function, types, constants) in kernels.items():
        types = {"source_ptr": "*u8", "out_ptr": "*u8", "first_ptr": "*i32", "weight_ptr": "*i32", **types}
        constants = {"TAPS": taps, "ONE_ROUND": True, "BITS": 22, "COMPUTED": True, "FRAMES": 1, **constants}
        warps = constants.pop("num_warps")
        constants = {each: value for each, value in constants.items() if each in function.arg_names}
        even = ["columns", "source_row", "out_row"] if function is triton._down_kernel else []  # as on the host
        needs = compiled(function, types, constants, arch, tmp_path, warps, even)
        record_property(f"{name} sm_{arch}", str(needs))
        assert needs.spill_bytes == 0 and needs.registers <= 108, (name, needs)  # Triton 3.7; others stay below 96


@pytest.mark.parametrize("mode", ["pil13", "tv"])
@pytest.mark.parametrize("mean, std", [(CLIP_MEAN, CLIP_STD), (HALF, HALF)])
def test_values_of_models_are_computed_and_not_looked_up(mode: str, mean: tuple, std: tuple) -> None:
    lines = triton.lines_of(affine(mean, std, mode))
    assert lines is not None
    made = torch.stack([triton.on_line(line) for line in lines])
    assert torch.equal(made, torch.from_numpy(level_table(mean, std, mode).copy()).to(torch.bfloat16))


def test_values_that_no_line_gives_are_looked_up() -> None:
    assert triton.lines_of(affine((0.0,) * 3, (1e-39,) * 3, "pil13")) is None


@pytest.mark.parametrize("size_in", [1, 2, 7, 17, 100, 1000])
def test_rounds_of_taps_fit_the_input(size_in: int) -> None:
    for taps in range(1, size_in + 1):
        rounds, each = triton.rounds_of(taps, size_in)
        assert taps <= rounds * each <= size_in and each in triton.TAPS
        assert each > 1 or taps == 1 or size_in - taps < 16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["full", "compact"])
def test_on_the_gpu_it_equals_the_reference_bit_by_bit(dtype: torch.dtype, layout: str) -> None:
    cases = [*CASES.values(), ((768, 1024), Target(756, 1036), {}), ((1000, 1500), Target(504, 756), {"mode": "tv"})]
    cases += [((768, 1024), Target(768, 1024), {"mean": HALF, "std": HALF, "patch": 16})]
    for size, target, options in cases:
        image, options = image_of(*size), options | {"dtype": dtype, "layout": layout}
        want = patchify(image, [target], impl="ref", **options)[0]
        for got in (
            patchify(image, [target], device="cuda", **options)[0],
            patchify(image.cuda(), [target], **options)[0],
        ):
            assert got.is_cuda and torch.equal(got.cpu(), want), (size, target, options)
