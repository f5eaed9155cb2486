"""The matrix product, whichever library does it, against float64; with gradients, odd sizes and awkward strides."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from vtengine.model import linear as module
from vtengine.model.linear import Linear, linear, linear_float32


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 7, 64, 333])
@pytest.mark.parametrize(("inner", "outer", "bias"), [(1, 1, True), (13, 31, False), (128, 200, True)])
def test_values_and_gradients(rows, inner, outer, bias):
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, inner), (outer, inner), *([(outer,)] if bias else [])]
    args = [torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in args]
    pull = torch.randn(rows, outer, generator=generator)
    out, expected = linear(*args), F.linear(*exact)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        assert torch.equal(linear(*args), out)
    found = torch.autograd.grad(out, args, pull)
    for ours, theirs in zip(found, torch.autograd.grad(expected, exact, pull.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-5)


def test_strided_inputs_and_expanded_gradients():
    wide = torch.randn(9, 40)
    weight = torch.randn(5, 20, requires_grad=True)
    linear(wide[:, 7:27], weight).sum().backward()
    torch.testing.assert_close(weight.grad, wide[:, 7:27].sum(0).expand(5, 20))
    torch.testing.assert_close(linear(wide[:, ::2], weight), F.linear(wide[:, ::2], weight))


def test_frozen_weight_passes_the_gradient_on():
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(3, 8)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(6, 8))


def test_an_in_place_change_before_backward_is_an_error():
    layer = Linear(8, 3)
    x = torch.randn(6, 8, requires_grad=True)
    out = layer(x).sum()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("better", [False, True])
def test_both_ways_agree(better, monkeypatch):
    if better and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN product")
    monkeypatch.setattr(module, "onednn_is_better", lambda weight: better)
    x, weight = torch.randn(50, 64), torch.randn(30, 64)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-4, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_results_on_the_cpu_are_those_of_linear(dtype):
    x, weight = torch.randn(5, 64).to(dtype), torch.randn(30, 64).to(dtype)
    found = linear_float32(x, weight)
    assert found.dtype == torch.float32 and torch.equal(found, linear(x, weight).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_cuda_torch_takes_the_product(dtype):
    """Without a GPU: by shapes, devices and dtypes only."""
    with FakeTensorMode(), torch.inference_mode():
        x, weight = (torch.empty(rows, 64, dtype=dtype, device="cuda") for rows in (5, 30))
        found = linear_float32(x, weight)
    assert found.shape == (5, 30) and found.dtype == torch.float32 and found.is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_the_gpu_sums_of_16_bits_are_not_rounded(rows, dtype):
    x, weight = (torch.randn(count, 1024).to("cuda", dtype) for count in (rows, 4096))
    exact = x.double() @ weight.double().t()
    with torch.inference_mode():
        assert (linear_float32(x, weight) - exact).abs().max() < 1e-3
        assert (linear(x, weight) - exact).abs().max() > 1e-2  # what a rounded product errs by
