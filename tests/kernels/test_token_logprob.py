"""token_logprob: every implementation errs no more than torch does, in values and gradients, whatever the chunk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vtengine_kernels.token_logprob import Head, LowRank, eager, native, ref, token_logprob
from vtengine_kernels.token_logprob.cases import CASES, Case

CPU = pytest.mark.skipif(native.missing() is not None, reason=f"no C++ library: {native.missing()}")
IMPLS = [pytest.param("cpu", marks=CPU), "torch"]


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote holds NaN."""
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")


def leaves(hidden, head):
    """(hidden, head, leaves) with every tensor a leaf that wants a gradient."""
    hidden, weight = hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    low_rank = head.low_rank
    if low_rank is None:
        return hidden, replace(head, weight=weight), [hidden, weight]
    low_rank = LowRank(low_rank.a.clone().requires_grad_(), low_rank.b.clone().requires_grad_(), low_rank.scale)
    return hidden, replace(head, weight=weight, low_rank=low_rank), [hidden, weight, low_rank.a, low_rank.b]


def run(case, impl, dtype=torch.float32, chunk=1024, **options):
    """[logprobs, entropies, gradients...] in float64, with a random pull on both outputs."""
    hidden, head, targets = case.tensors(dtype)
    hidden, head, wanted = leaves(hidden, head)
    out = token_logprob(hidden, head, targets, impl=impl, chunk=chunk, **options)
    generator = torch.Generator().manual_seed(1)
    pull = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in out)
    return [x.detach().double() for x in (*out, *torch.autograd.grad(pull, wanted))]


def distance(first, second):
    return float((first - second).norm()) if first.numel() else 0.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_errs_no_more_than_torch(name, impl):
    case = CASES[name]
    exact, plain = run(case, "ref", torch.float64), run(case, "ref")
    for chunk in (1024, 5):
        for found, torchs, true in zip(run(case, impl, chunk=chunk), plain, exact, strict=True):
            assert found.shape == true.shape
            assert distance(found, true) <= 1.5 * distance(torchs, true) + 2e-6 * float(true.norm()) + 1e-9


@CPU
@pytest.mark.parametrize("name", [name for name in CASES if name != "empty"])
def test_every_instruction_set_works_rows_like_torch(name, isa):
    hidden, head, targets = CASES[name].tensors()
    plain = replace(head, soft_cap=None, temperature=1.0)
    scores = ref.scores(hidden, plain)
    slopes = (torch.randn(len(hidden)), torch.randn(len(hidden)))
    results = []
    for run_statistics, run_gradients in (
        (eager.statistics, eager.gradients_),
        (lambda *a: native.statistics(*a, isa=isa), lambda *a: native.gradients_(*a, isa=isa)),
    ):
        mine = scores.clone()
        logprobs, entropies, totals = run_statistics(mine, targets, head)
        run_gradients(mine, targets, totals, entropies, slopes, head)
        results.append((logprobs, entropies, totals, mine))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@CPU
def test_threads_change_nothing():
    case = CASES["all"]
    before, one = torch.get_num_threads(), run(case, "cpu")
    torch.set_num_threads(2)
    try:
        for first, second in zip(one[:2], run(case, "cpu")[:2], strict=True):
            torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_weights_give_the_numbers_of_float32(impl, products_of_bfloat16):
    """Gradients are only as fine as their dtype, but finer than torch's in it."""
    case = Case(40, 64, 2003, num_banned=2, rank=2)
    narrow, torchs = run(case, impl, torch.bfloat16, chunk=16), run(case, "ref", torch.bfloat16)
    exact = run(case, "ref", torch.float64)
    for found, true in zip(narrow[:2], exact[:2], strict=True):
        assert distance(found, true) <= 5e-6 * float(true.norm())
    for found, plain, true in zip(narrow[2:], torchs[2:], exact[2:], strict=True):
        assert distance(found, true) <= min(0.5 * distance(plain, true), 5e-3 * float(true.norm()))


@pytest.mark.parametrize("impl", [*IMPLS, "ref"])
def test_masked_rows_cost_nothing_and_get_zeros(impl):
    case = CASES["prime"]
    hidden, head, targets = case.tensors()
    mask = torch.arange(len(hidden)) % 3 == 0
    hidden, targets = hidden.clone(), targets.clone()
    hidden[~mask], targets[~mask] = float("nan"), -100
    hidden, head, wanted = leaves(hidden, head)
    logprobs, entropies = token_logprob(hidden, head, targets, mask=mask, impl=impl, chunk=4)
    expected = token_logprob(hidden[mask], head, targets[mask], impl="ref")
    torch.testing.assert_close(logprobs[mask], expected[0], atol=1e-5, rtol=1e-5)
    assert (logprobs[~mask] == 0).all() and (entropies[~mask] == 0).all()
    gradient, to_weight = torch.autograd.grad(logprobs.sum() + entropies.sum(), wanted)
    assert (gradient[~mask] == 0).all() and gradient[mask].isfinite().all() and to_weight.isfinite().all()
    none = token_logprob(hidden, head, targets, mask=torch.zeros_like(mask), impl=impl)
    assert (none[0] == 0).all()


@pytest.mark.parametrize("impl", [*IMPLS, "ref"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_broken_hidden_states_show_in_their_rows_only(impl, bad):
    hidden, head, targets = CASES["usual"].tensors()
    clean = token_logprob(hidden, head, targets, impl=impl)
    hidden[3, 5] = bad
    for values, expected in zip(token_logprob(hidden, head, targets, impl=impl), clean, strict=True):
        assert not values[3].isfinite()
        rest = torch.arange(len(values)) != 3
        torch.testing.assert_close(values[rest], expected[rest])


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_scores_stay_exact(impl):
    hidden, head, targets = CASES["usual"].tensors()
    found = token_logprob(hidden * 300, head, targets, impl=impl)
    exact = token_logprob(hidden.double() * 300, Head(head.weight.double()), targets, impl="ref")
    for values, true in zip(found, exact, strict=True):
        torch.testing.assert_close(values.double(), true, rtol=1e-6, atol=2e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_is_wanted_gets_a_gradient(impl):
    hidden, head, targets = CASES["low rank"].tensors()
    low_rank = replace(head.low_rank, b=head.low_rank.b.clone().requires_grad_())
    frozen = replace(head, low_rank=low_rank)
    token_logprob(hidden, frozen, targets, impl=impl)[0].sum().backward()
    assert low_rank.b.grad is not None and head.weight.grad is None and low_rank.a.grad is None
    assert not token_logprob(hidden, head, targets, impl=impl)[0].requires_grad


def test_a_banned_target_gets_no_gradient_through_its_score():
    hidden, head, targets = CASES["banned"].tensors()
    targets[0] = 575
    hidden, head, wanted = leaves(hidden, head)
    for impl in ("torch", "ref"):
        logprobs, _ = token_logprob(hidden, head, targets, impl=impl)
        assert logprobs[0] < -1e29
        assert (torch.autograd.grad(logprobs.sum(), wanted)[1][head.banned] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_views_of_wider_tensors(impl):
    hidden, head, targets = CASES["prime"].tensors()
    wide = torch.full((len(hidden), 2 * hidden.shape[1]), float("nan"))
    wide[:, ::2] = hidden
    tall = torch.full((head.weight.shape[1], head.weight.shape[0]), float("nan"))
    tall[:] = head.weight.t()
    found = token_logprob(wide[:, ::2], replace(head, weight=tall.t()), targets, impl=impl)
    for values, expected in zip(found, token_logprob(hidden, head, targets, impl=impl), strict=True):
        torch.testing.assert_close(values, expected)


def test_bad_arguments_are_named():
    hidden, head, targets = CASES["low rank"].tensors()
    for change, match in (
        ({"hidden": hidden[:, 1:]}, "hidden"),
        ({"hidden": hidden.double()}, "float64"),
        ({"hidden": hidden.half(), "head": Head(head.weight.half())}, "float16"),
        ({"targets": targets[1:]}, "targets"),
        ({"targets": targets.int()}, "int64"),
        ({"targets": targets + 600}, "from 0 to 508"),
        ({"targets": targets - 600}, "targets hold -"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(len(hidden))}, "mask"),
        ({"chunk": 0}, "chunk"),
        ({"head": replace(head, temperature=0.0)}, "temperature"),
        ({"head": replace(head, soft_cap=-1.0)}, "soft_cap"),
        ({"head": replace(head, banned=torch.tensor([509]))}, "banned"),
        ({"head": replace(head, banned=torch.tensor([1.0]))}, "banned"),
        ({"head": replace(head, low_rank=LowRank(head.low_rank.a, head.low_rank.b[1:]))}, "low_rank"),
        ({"head": replace(head, low_rank=replace(head.low_rank, scale=float("nan")))}, "scale"),
        ({"hidden": hidden[:, :0], "head": Head(head.weight[:, :0])}, "H and V at least 1"),
        ({"head": replace(head, weight=head.weight.to("meta"))}, "one device"),
        ({"impl": "gpu"}, "impl"),
    ):
        arguments = {"hidden": hidden, "head": head, "targets": targets, **change}
        with pytest.raises(ValueError, match=match):
            token_logprob(**arguments)
    with pytest.raises(ValueError, match="float64 on cpu"):
        token_logprob(hidden.double(), Head(head.weight.double()), targets, impl="torch")
