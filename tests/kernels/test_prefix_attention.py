"""prefix_attention: every implementation errs no more than torch does, and reads nothing beyond a length."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from vtengine_kernels import library
from vtengine_kernels.prefix_attention import native, prefix_attention, ref
from vtengine_kernels.prefix_attention.cases import CASES, Case

CPU = pytest.mark.skipif(native.missing() is not None, reason=f"no C++ library: {native.missing()}")


def truth(q, keys, values, tables, lengths):
    return ref.prefix_attention(q.double(), keys.double(), values.double(), tables, lengths, q.shape[2] ** -0.5)


def torch_error(case, exact):
    """The largest error of scaled_dot_product_attention on the same numbers, row by row."""
    q, keys, values, tables, lengths = case.tensors()
    worst = 0.0
    for row, length in enumerate(lengths.tolist()):
        pages = tables[row, : -(-length // case.page_size)]
        k, v = (cache[pages].flatten(0, 1)[:length].transpose(0, 1) for cache in (keys, values))
        out = F.scaled_dot_product_attention(q[row][:, None], k, v, enable_gqa=True)[:, 0]
        worst = max(worst, float((out - exact[row]).abs().max()))
    return worst


@CPU
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("name", CASES)
def test_errs_no_more_than_torch(name, isa):
    if isa not in library.isas():
        pytest.skip(f"this machine has no {isa}")
    tensors = CASES[name].tensors()
    out = native.prefix_attention(*tensors, tensors[0].shape[2] ** -0.5, isa=isa)
    assert out.shape == tensors[0].shape
    if len(out):
        exact = truth(*tensors)
        assert (out - exact).abs().max() <= torch_error(CASES[name], exact) + 1e-6


@CPU
def test_extreme_scores_stay_exact():
    q, keys, values, tables, lengths = Case((40, 3)).tensors()
    q = q * 300
    out = prefix_attention(q, keys, values, tables, lengths)
    assert torch.allclose(out.double(), truth(q, keys, values, tables, lengths), atol=1e-4)


@CPU
def test_queries_may_be_a_view_and_threads_change_nothing():
    q, keys, values, tables, lengths = CASES["usual"].tensors()
    wide = torch.full((len(q), 9, q.shape[2]), float("nan"))
    wide[:, :4] = q
    expected = prefix_attention(q, keys, values, tables, lengths)
    assert torch.equal(prefix_attention(wide[:, :4], keys, values, tables, lengths), expected)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(prefix_attention(q, keys, values, tables, lengths), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", [name for name in CASES if name != "empty"])
def test_the_reference_is_attention(name):
    case = CASES[name]
    exact = truth(*case.tensors())
    assert torch_error(case, exact) < 1e-5
    assert torch.allclose(prefix_attention(*case.tensors(), impl="ref").double(), exact, atol=1e-5)


def test_bad_arguments_are_named():
    q, keys, values, tables, lengths = CASES["usual"].tensors()
    with pytest.raises(ValueError, match="values"):
        prefix_attention(q, keys, values[:, :, :1], tables, lengths)
    with pytest.raises(ValueError, match="tables"):
        prefix_attention(q, keys, values, tables[:2], lengths)
    with pytest.raises(ValueError, match="lengths"):
        prefix_attention(q, keys, values, tables, lengths.int())
    with pytest.raises(ValueError, match="float64"):
        prefix_attention(q.double(), keys, values, tables, lengths)
    with pytest.raises(ValueError, match="impl"):
        prefix_attention(q, keys, values, tables, lengths, impl="gpu")
