"""visual_scatter: rows to their places, gradients back by feature, in a fixed order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vtengine_kernels.visual_scatter import Placement, visual_scatter


def random_rows(places, features, seed=0):
    return np.random.default_rng(seed).integers(0, features, places)


@pytest.mark.parametrize(
    ("places", "features", "width"), [(101, 13, 37), (1, 1, 1), (0, 5, 8), (7, 211, 64), (40, 1, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients(places, features, width, dtype):
    generator = torch.Generator().manual_seed(1)
    rows = random_rows(places, features)
    x = torch.randn(features, width, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(places, width, generator=generator).to(dtype)
    out = visual_scatter(x, Placement.of(rows, features))
    assert torch.equal(out, x[torch.from_numpy(rows)])
    out.backward(grad)
    exact = torch.zeros(features, width, dtype=torch.float64)
    for place, row in enumerate(rows):
        exact[row] += grad[place].double()
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(x.grad.double(), exact, rtol=tolerance, atol=tolerance)
    assert x.grad.dtype == dtype


def test_the_sum_is_the_same_every_time():
    x = torch.randn(11, 33, requires_grad=True)
    placement = Placement.of(random_rows(5000, 11), 11)
    grad = torch.randn(5000, 33)
    first, second = (torch.autograd.grad(visual_scatter(x, placement), x, grad)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_strided_gradients():
    x = torch.randn(4, 6, requires_grad=True)
    placement = Placement.of(np.array([3, 0, 3]), 4)
    (found,) = torch.autograd.grad(visual_scatter(x, placement), x, torch.ones(1, 1).expand(3, 6))
    assert found[:, 0].tolist() == [1, 0, 0, 2]


def test_order_is_by_feature_then_by_appearance():
    placement = Placement.of(np.array([2, 0, 2, 2, 0]), 4)
    assert placement.order.tolist() == [1, 4, 0, 2, 3]
    assert placement.starts.tolist() == [0, 2, 2, 5, 5]


def test_bad_arguments_are_named():
    placement = Placement.of(np.array([0, 1]), 2)
    with pytest.raises(ValueError, match=r"features \[3, 4\]: must be \[2, H\]"):
        visual_scatter(torch.zeros(3, 4), placement)
    with pytest.raises(ValueError, match="features on meta"):
        visual_scatter(torch.zeros(2, 4, device="meta"), placement)
    with pytest.raises(ValueError, match="impl = 'gpu'"):
        visual_scatter(torch.zeros(2, 4), placement, impl="gpu")
    with pytest.raises(RuntimeError, match="not available"):
        visual_scatter(torch.zeros(2, 4), placement, impl="triton")
    for rows in ([0, 2], [-1]):
        with pytest.raises(ValueError, match=r"within 0 \.\. 1"):
            Placement.of(np.array(rows), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "ref"])
def test_on_the_gpu(impl):
    rows = random_rows(5000, 211)
    grad = torch.randn(5000, 1030)
    x = torch.randn(211, 1030, requires_grad=True)
    (exact,) = torch.autograd.grad(visual_scatter(x.double(), Placement.of(rows, 211)), x, grad.double())
    y = x.detach().cuda().requires_grad_()
    found = [
        torch.autograd.grad(visual_scatter(y, Placement.of(rows, 211, "cuda"), impl=impl), y, grad.cuda())[0]
        for _ in range(2)
    ]
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0].cpu(), exact, rtol=1e-5, atol=1e-5)
