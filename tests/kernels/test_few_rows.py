"""Products of few bfloat16 rows: exact up to the rounding of float32 sums, whatever the sizes, strides and threads."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from vtengine_kernels import few_rows

from vtengine.model.linear import linear, linear_float32

here = pytest.mark.skipif(few_rows.missing() is not None, reason=f"no such products: {few_rows.missing()}")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@here
@pytest.mark.parametrize("rows", [*range(1, 14), 24])
@pytest.mark.parametrize(("size", "outputs", "bias"), [(1, 1, True), (13, 31, False), (96, 4, True), (2048, 201, True)])
def test_sums_are_float32_and_rounded_once(rows, size, outputs, bias):
    x, weight = numbers(rows, size), numbers(outputs, size, seed=1)
    b = numbers(outputs, seed=2) if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    found = few_rows.product(x, weight, b, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=2e-6 * size**0.5, rtol=2e-6)
    assert torch.equal(few_rows.product(x, weight, b), found.bfloat16())


@here
def test_a_row_depends_on_nothing_else_whatever_the_threads_and_the_view():
    x, weight = numbers(17, 320), numbers(700, 320, seed=1)
    whole = few_rows.product(x, weight)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(few_rows.product(x, weight), whole)
    finally:
        torch.set_num_threads(before)
    for row in range(len(x)):
        assert torch.equal(few_rows.product(x[row : row + 1], weight), whole[row : row + 1])
    wide_x, wide = (torch.full((len(y), 400), float("nan"), dtype=torch.bfloat16) for y in (x, weight))
    wide_x[:, 8:328], wide[:, 8:328] = x, weight
    assert torch.equal(few_rows.product(wide_x[:, 8:328], wide[:, 8:328]), whole)


@here
def test_what_is_not_finite_stays_so_and_nothing_is_nothing():
    x, weight = numbers(3, 40), numbers(9, 40, seed=1)
    x[1, 5], weight[7, 39] = float("inf"), float("nan")
    out = few_rows.product(x, weight)
    assert out[:, 7].isnan().all() and not out[1].isfinite().any()
    assert out[0, :7].isfinite().all() and out[2, 8].isfinite()
    assert few_rows.product(numbers(0, 40), weight).shape == (0, 9)
    assert (few_rows.product(numbers(2, 0), numbers(5, 0)) == 0).all()


@here
def test_the_model_takes_them_in_inference_and_where_they_are_faster():
    x, weight, bias = numbers(3, 64), numbers(30, 64, seed=1), numbers(30, seed=2)
    assert not few_rows.takes(x, weight)  # gradients may be wanted
    with torch.inference_mode():
        assert torch.equal(linear(x, weight, bias), few_rows.product(x, weight, bias))
        assert torch.equal(linear_float32(x, weight), few_rows.product(x, weight, dtype=torch.float32))
        assert not few_rows.takes(x.float(), weight.float()) and not few_rows.takes(x[:0], weight)
        assert not few_rows.takes(numbers(few_rows.MOST_ROWS + 1, 64), weight)
        turned = weight.t().contiguous().t()
        assert not few_rows.takes(x, turned)
        torch.testing.assert_close(linear(x, turned), linear(x, weight))


def test_where_they_are_not_torch_takes_the_product(monkeypatch):
    monkeypatch.setattr(few_rows, "missing", lambda: "the processor has no AVX-512 BF16")
    x, weight = numbers(3, 64), numbers(30, 64, seed=1)
    with torch.inference_mode():
        assert not few_rows.takes(x, weight)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
