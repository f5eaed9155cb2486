"""Every implementation and instruction set that this machine can run, and images to run patchify on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from vtengine_kernels import library
from vtengine_kernels.patchify import Target, native, ref
from vtengine_kernels.patchify.contract import checked_plan
from vtengine_kernels.token_logprob import products

Run = Callable[..., list[torch.Tensor]]
IMPLEMENTATIONS = ("ref", "scalar", "avx2", "avx512")


def run_as(name: str) -> Run:
    """patchify with one implementation; `stream` (stores past the caches) is an extra keyword."""

    def run(
        image: np.ndarray, targets: Sequence[Target], stream: bool | None = None, **options: object
    ) -> list[torch.Tensor]:
        plan = checked_plan(image, targets, **options)
        return ref.run(plan) if name == "ref" else native.run(plan, isa=name, stream=stream)

    return run


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request: pytest.FixtureRequest) -> Run:
    """Each implementation in turn."""
    if request.param != "ref" and request.param not in library.isas():
        pytest.skip(f"{request.param}: not on this machine, or the C++ library is not built")
    return run_as(request.param)


@pytest.fixture(params=IMPLEMENTATIONS[1:])
def compiled(request: pytest.FixtureRequest) -> Run:
    """Each compiled implementation in turn."""
    if request.param not in library.isas():
        pytest.skip(f"{request.param}: not on this machine, or the C++ library is not built")
    return run_as(request.param)


@pytest.fixture(params=IMPLEMENTATIONS[1:])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of the C++ library in turn, which is also the one that "auto" means."""
    if request.param not in library.isas():
        pytest.skip(f"{request.param}: not on this machine, or the C++ library is not built")
    monkeypatch.setitem(library.ISAS, "auto", library.ISAS[request.param])
    return str(request.param)


@pytest.fixture
def picture() -> Callable[[int, int], np.ndarray]:
    """picture(height, width): uint8 [height, width, 3], noise with hard edges, so that levels clip at both ends."""
    rng = np.random.default_rng(20250713)

    def make(height: int, width: int) -> np.ndarray:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image[rng.random((height, width)) < 0.3] = 255
        image[rng.random((height, width)) < 0.3] = 0
        return image

    return make


@pytest.fixture(params=["widened", "bfloat16"])
def products_of_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way in which the CPU multiplies bfloat16 weights, in turn."""
    if request.param == "bfloat16" and not products.multiplies_bfloat16():
        pytest.skip("this processor does not multiply bfloat16")
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: request.param == "bfloat16")
    return str(request.param)
