"""prefix_attention: every implementation errs no more than torch does, and reads nothing beyond a length."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from vtengine_kernels import library
from vtengine_kernels.prefix_attention import Crossover, Siblings, native, prefix_attention, ref
from vtengine_kernels.prefix_attention.cases import CASES, Case

CPU = pytest.mark.skipif(native.missing() is not None, reason=f"no C++ library: {native.missing()}")
BF16 = torch.bfloat16
WAYS = [(isa, dtype) for dtype in (torch.float32, BF16) for isa in ("scalar", "avx2", "avx512")]
"""Instruction set and dtype; "auto" multiplies bfloat16 as it is where the processor can, "avx512" widens it."""


@pytest.fixture(params=[*WAYS, ("auto", BF16)], ids=lambda way: f"{way[0]}-{way[1]}")
def way(request):
    if request.param[0] not in ("auto", *library.isas()):
        pytest.skip(f"{request.param[0]}: not on this machine, or the C++ library is not built")
    return request.param


def is_close(out, exact):
    """To float32's accuracy, rounded once."""
    return ((out.double() - exact).abs() <= (exact.abs() * 2**-8 if out.dtype == BF16 else 0.0) + 1e-5).all()


def truth(q, keys, values, tables, lengths):
    return ref.prefix_attention(q.double(), keys.double(), values.double(), tables, lengths, q.shape[2] ** -0.5)


def torch_error(case, exact, dtype=torch.float32):
    """The largest error of scaled_dot_product_attention on the same numbers, row by row."""
    q, keys, values, tables, lengths = case.tensors(dtype)
    worst = 0.0
    for row, length in enumerate(lengths.tolist()):
        pages = tables[row, : -(-length // case.page_size)]
        k, v = (cache[pages].flatten(0, 1)[:length].transpose(0, 1) for cache in (keys, values))
        out = F.scaled_dot_product_attention(q[row][:, None], k, v, enable_gqa=True)[:, 0]
        worst = max(worst, float((out - exact[row]).abs().max()))
    return worst


@CPU
@pytest.mark.parametrize("name", CASES)
def test_errs_no_more_than_torch(name, way):
    isa, dtype = way
    tensors = CASES[name].tensors(dtype)
    out = native.prefix_attention(*tensors, tensors[0].shape[2] ** -0.5, isa=isa)
    assert out.shape == tensors[0].shape and out.dtype == dtype
    if len(out):
        exact = truth(*tensors)
        assert (out - exact).abs().max() <= torch_error(CASES[name], exact, dtype) + 1e-6
        assert is_close(out, exact)


@CPU
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_extreme_scores_stay_exact(dtype):
    q, keys, values, tables, lengths = Case((40, 3)).tensors(dtype)
    q = q * 300
    out = prefix_attention(q, keys, values, tables, lengths)
    exact, rounding = truth(q, keys, values, tables, lengths), 2**-8 if dtype == BF16 else 1e-5
    assert torch.allclose(out.double(), exact, atol=1e-4, rtol=rounding)


@CPU
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_score_of_minus_infinity_is_no_weight(dtype):
    q, keys, values, tables, lengths = Case((40, 3)).tensors(dtype)
    q[:, :, 0], keys[tables[0, 1], 3, :, 0] = 1.0, -torch.inf
    assert is_close(prefix_attention(q, keys, values, tables, lengths), truth(q, keys, values, tables, lengths))


@CPU
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_queries_may_be_a_view_and_threads_change_nothing(dtype):
    q, keys, values, tables, lengths = CASES["usual"].tensors(dtype)
    wide = torch.full((len(q), 9, q.shape[2]), float("nan"), dtype=dtype)
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
    for bad in (q[0], q[..., :3]):
        with pytest.raises(ValueError, match=r"keys .* for q"):
            prefix_attention(bad, keys, values, tables, lengths)
    for empty in (keys[:, :, :0], keys[..., :0]):
        with pytest.raises(ValueError, match="Hkv"):
            prefix_attention(q[..., : empty.shape[3]], empty, empty, tables, lengths)
    with pytest.raises(ValueError, match="tables"):
        prefix_attention(q, keys, values, tables[:, 0], lengths)
    with pytest.raises(ValueError, match=r"lengths .* on meta"):
        prefix_attention(q, keys, values, tables, lengths.to("meta"))


@pytest.mark.parametrize("name", ["keys", "values", "tables", "lengths"])
def test_what_is_read_in_place_must_be_contiguous(name):
    """Spread out to twice the memory, it has the same numbers at other addresses."""
    case = CASES["usual"].tensors()
    arguments = dict(zip(("q", "keys", "values", "tables", "lengths"), case, strict=True))
    spread = torch.stack((arguments[name],) * 2, dim=-1)[..., 0]
    with pytest.raises(ValueError, match=rf"^{name} with strides .*: must be contiguous"):
        prefix_attention(**(arguments | {name: spread}))


def forest(seed, shape, dtype=torch.float32, most=170):
    """Tensors of rows whose page tables are paths in a random tree, and those paths."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    heads, kv_heads, size, page_size = shape
    tables, num_pages = [], 0
    for _ in range(chance.randint(1, 20)):
        parent = chance.choice(tables) if tables and chance.random() < 0.8 else []
        kept = chance.choice((len(parent), chance.randint(0, len(parent))))
        own = chance.randint(0 if kept else 1, max(1, (most - kept * page_size) // page_size))
        tables.append(parent[:kept] + list(range(num_pages, num_pages + own)))
        num_pages += own
    width = max(map(len, tables))
    # a length may end anywhere in the table, a shared page included: tokens of one row come as rows of their own
    lengths = torch.tensor([chance.randint(max(1, len(t) * page_size - 70), len(t) * page_size) for t in tables])
    keys, values = (torch.randn(num_pages, page_size, kv_heads, size, generator=generator) for _ in range(2))
    q = 2 * torch.randn(len(tables), heads, size, generator=generator)
    padded = torch.tensor([table + [0] * (width - len(table)) for table in tables])
    return (q.to(dtype), keys.to(dtype), values.to(dtype), padded, lengths), tables


SHAPES = ((4, 2, 64, 16), (7, 1, 16, 5), (28, 4, 128, 16), (3, 3, 80, 1), (80, 2, 32, 64))


@CPU
@pytest.mark.parametrize("shape", SHAPES)
def test_siblings_change_no_bit(way, shape):
    isa, dtype = way
    shared_anything = 0
    before = torch.get_num_threads()
    for seed in range(12):
        tensors, tables = forest(seed, shape, dtype)
        scale = shape[2] ** -0.5
        plain = native.prefix_attention(*tensors, scale, isa=isa)
        assert is_close(plain, truth(*tensors))
        siblings = Siblings.of(tables, shape[3], Crossover())
        shared_anything += siblings is not None and int(siblings.shared.max()) >= 64
        try:
            for threads in (1, 3):  # which cut the rows differently
                torch.set_num_threads(threads)
                assert torch.equal(native.prefix_attention(*tensors, scale, siblings, isa=isa), plain)
        finally:
            torch.set_num_threads(before)
    assert shared_anything > 2


@CPU
def test_a_row_has_the_same_bits_in_any_company(way):
    isa, dtype = way
    tensors, tables = forest(3, SHAPES[0], dtype)
    q, keys, values, padded, lengths = tensors
    together = native.prefix_attention(*tensors, 0.125, Siblings.of(tables, 16, Crossover()), isa=isa)
    for row in range(len(q)):
        one = slice(row, row + 1)
        alone = native.prefix_attention(q[one], keys, values, padded[one], lengths[one], 0.125, isa=isa)
        assert torch.equal(alone[0], together[row])


def test_siblings_are_those_with_equal_beginnings():
    for seed in range(30):
        _, tables = forest(seed, SHAPES[1])
        found = Siblings.of(tables, 5, Crossover())
        best = [max((equal(a, b) for b in tables if b is not a), default=0) for a in tables]
        if found is None:
            assert not any(best)
            continue
        order, shared = found.order.tolist(), found.shared.tolist()
        assert sorted(order) == list(range(len(tables))) and shared[0] == 0
        for n in range(1, len(order)):
            assert shared[n] == 5 * equal(tables[order[n - 1]], tables[order[n]])
        for n, row in enumerate(order):  # nobody stands away from the row that it shares most with
            assert max(shared[n : n + 2]) == 5 * best[row]


def equal(a, b):
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize(
    ("shared", "kept"),
    [
        ([0, 90, 90], [0, 90, 90]),  # three share enough
        ([0, 90], [0, 0]),  # two would have to share 100
        ([0, 50, 200, 60, 90, 40, 99], [0, 0, 200, 0, 0, 0, 0]),
        ([0, 100, 90, 80, 80], [0, 100, 90, 80, 80]),
        ([0], [0]),
        ([], []),
    ],
)
def test_too_little_is_not_shared(shared, kept):
    Crossover((2, 3), (100, 80)).drop_small(shared)
    assert shared == kept
    assert Siblings.of([[1, 2], [1, 3]], 16, Crossover((2,), (17,))) is None
    assert Siblings.of([[1, 2], [1, 3]], 16, Crossover((), ())) is None


def test_siblings_must_be_of_the_same_rows():
    tensors = CASES["siblings"].tensors()
    with pytest.raises(ValueError, match="siblings of 2 rows"):
        prefix_attention(*tensors, Siblings(torch.arange(2), torch.zeros(2, dtype=torch.int64)))


@CPU
def test_a_cache_of_more_than_2_31_numbers():
    """Its memory is zeros that nobody touches but for the last pages."""
    row = (16, 2, 64)
    pages = 2**31 // np.prod(row) + 2
    try:
        cache = torch.from_numpy(np.zeros((pages, *row), np.float32))
    except MemoryError:
        pytest.skip("not enough address space")
    cache[-2:] = small = torch.randn(2, *row, generator=torch.Generator().manual_seed(0))
    q, lengths = torch.ones(1, 4, 64), torch.tensor([30])
    found = prefix_attention(q, cache, cache, torch.tensor([[pages - 2, pages - 1]]), lengths)
    assert torch.equal(found, prefix_attention(q, small, small, torch.tensor([[0, 1]]), lengths))
