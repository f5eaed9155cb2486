"""FlashInfer's gate behind layer_ops: taken by name where it can run, called as the package says, right on a GPU."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from vtengine_kernels import layer_ops
from vtengine_kernels.layer_ops import flashinfer, plain

INSTALLED = importlib.util.find_spec("flashinfer") is not None


@pytest.fixture
def calls(monkeypatch):
    """The package as a stand-in that computes in torch; the tensors that it was given."""
    found = []

    def silu_and_mul(input, out=None, enable_pdl=None):
        assert input.is_contiguous() and input.shape[-1] % 2 == 0
        found.append(input)
        return plain.swiglu(input)

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(silu_and_mul=silu_and_mul))
    monkeypatch.setattr(flashinfer, "missing", lambda: None)
    flashinfer._silu_and_mul.cache_clear()
    yield found
    flashinfer._silu_and_mul.cache_clear()


def on_cuda(x):
    return SimpleNamespace(is_cuda=True, dtype=x.dtype, shape=x.shape, element_size=x.element_size)


def test_it_is_called_with_rows_as_it_wants_them(calls):
    wide = torch.randn(6, 96).bfloat16()
    for x in (wide, wide[:, :64], wide[::2]):
        assert torch.equal(flashinfer.swiglu(x), plain.swiglu(x))
    assert len(calls) == 3
    assert flashinfer.swiglu(wide[:0]).shape == (0, 48) and len(calls) == 3


def test_it_is_taken_by_name_in_inference_on_cuda_only(calls, monkeypatch):
    x = torch.randn(3, 64).bfloat16()
    with torch.inference_mode():
        assert not flashinfer.takes(x) and flashinfer.takes(on_cuda(x))
        assert not flashinfer.takes(on_cuda(x.float()))
        assert not flashinfer.takes(on_cuda(torch.zeros(3, 2 * 3420).bfloat16()))  # Qwen2.5-VL's tower: 6840 bytes
        with pytest.raises(ValueError, match="takes no"):
            layer_ops.swiglu(x, impl="flashinfer")
    assert not flashinfer.takes(on_cuda(x))  # gradients may be wanted
    monkeypatch.setattr(flashinfer, "takes", lambda x: torch.is_inference_mode_enabled())
    with pytest.raises(ValueError, match="takes no"):
        layer_ops.swiglu(x, impl="flashinfer")
    with torch.inference_mode():
        torch.testing.assert_close(layer_ops.swiglu(x), plain.swiglu(x))  # the C++ one rounds once, where it is
        assert not calls
        assert torch.equal(layer_ops.swiglu(x, impl="flashinfer"), plain.swiglu(x)) and len(calls) == 1
        with pytest.raises(ValueError, match="must be one of auto, triton, cpu, torch"):
            layer_ops.rms_norm(x, x[0], 1e-6, impl="flashinfer")


@pytest.mark.skipif(not INSTALLED, reason="flashinfer is not installed")
def test_the_package_takes_one_tensor():
    inspect.signature(importlib.import_module("flashinfer").silu_and_mul).bind(torch.zeros(1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_the_gpu_it_errs_no_more_than_torch(dtype):
    if flashinfer.missing() is not None:
        pytest.skip(flashinfer.missing())
    for rows, size in ((1, 8), (5, 18_944), (300, 11_008)):
        x = torch.randn(rows, 2 * size, device="cuda", dtype=dtype) * 4
        exact = plain.swiglu(x.double())
        with torch.inference_mode():
            out, torchs = (layer_ops.swiglu(x, impl=impl) for impl in ("flashinfer", "torch"))
        assert (out - exact).norm() <= 1.5 * (torchs - exact).norm()
    x = torch.randn(7, 2 * 3420, device="cuda", dtype=dtype) * 4
    with torch.inference_mode():
        assert not flashinfer.takes(x)
