"""Micro-benchmarks of the kernels, by pytest-benchmark: `python -m pytest benchmarks/micro/bench_*.py`, or the suite
`kernels` of benchmarks/run.py, which keeps the figures. One group per op and case; the reference is in each group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from vtengine_kernels import triton_runtime


@pytest.fixture(params=["auto", "ref"])
def impl(request: pytest.FixtureRequest) -> str:
    """What the product runs here, and the reference: plain torch, numpy for images."""
    return str(request.param)


@pytest.fixture
def measure(benchmark, impl: str, device: str) -> Callable[[str, str, Callable[[], object]], None]:
    """measure(op, case, call): times the call. On a GPU each is waited for, the way to the GPU counts."""

    def run(op: str, case: str, call: Callable[[], object]) -> None:
        def waited() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{op}, {case}"
        benchmark.extra_info.update(op=op, case=case, impl=impl, device=device, threads=torch.get_num_threads())
        waited()  # compiled, and memory taken
        benchmark(waited)

    return run


@pytest.fixture
def device() -> str:
    if triton_runtime.interpreted():
        pytest.skip("TRITON_INTERPRET is set: the interpreter's time says nothing")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def dtype(device: str) -> torch.dtype:
    """Of the product: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device == "cuda" else torch.float32


@pytest.fixture
def cuda(device: str) -> str:
    """For ops of which a CPU runs the reference."""
    if device != "cuda":
        pytest.skip("the product runs the reference here: no CUDA device")
    return device
