"""grpo_loss: loss and gradients of every objective against float64, whatever the chunk, and nothing copied."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vtengine_kernels.grpo_loss import Head, Objective, Tokens, grpo_loss
from vtengine_kernels.grpo_loss.cases import OBJECTIVES, make_tokens
from vtengine_kernels.token_logprob import LowRank, native, token_logprob
from vtengine_kernels.token_logprob.cases import CASES, Case

CPU = pytest.mark.skipif(native.missing() is not None, reason=f"no C++ library: {native.missing()}")
IMPLS = [pytest.param("cpu", marks=CPU), "torch"]


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote holds NaN."""
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")


def in_dtype(head, dtype, grad=True):
    """The head in another dtype, its tensors leaves; and the leaves."""
    weight = head.weight.to(dtype).clone().requires_grad_(grad)
    if head.low_rank is None:
        return replace(head, weight=weight), [weight]
    a, b = (x.to(dtype).clone().requires_grad_(grad) for x in (head.low_rank.a, head.low_rank.b))
    return replace(head, weight=weight, low_rank=LowRank(a, b, head.low_rank.scale)), [weight, a, b]


def run(case, objective, impl, dtype=torch.float32, chunk=1024, mask=None, change=None):
    """(loss, its gradients in float64)."""
    hidden, head, targets = case.tensors()
    logprobs, _ = token_logprob(hidden, head, targets, impl="ref")
    tokens = make_tokens(logprobs, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    tokens = tokens if change is None else replace(tokens, **change)
    hidden = hidden.to(dtype).clone().requires_grad_()
    head, leaves = in_dtype(head, dtype)
    loss = grpo_loss(hidden, head, targets, tokens, objective, impl=impl, chunk=chunk, mask=mask)
    return loss, [x.double() for x in torch.autograd.grad(loss.total, [hidden, *leaves])]


def agree(found, true, loss=1e-6, gradient=1e-5):
    assert found[0].total.dtype == torch.float32
    assert abs(float(found[0].total.detach()) - float(true[0].total.detach())) <= loss * max(
        1.0, abs(float(true[0].total.detach()))
    )
    for ours, exact in zip(found[1], true[1], strict=True):
        assert float((ours - exact).norm()) <= gradient * float(exact.norm()) + 1e-12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_against_float64(name, impl):
    true = run(CASES["all"], OBJECTIVES[name], "ref", torch.float64)
    for chunk in (1024, 9, 1):
        agree(run(CASES["all"], OBJECTIVES[name], impl, chunk=chunk), true)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "all"])
def test_every_head_against_float64(name, impl):
    objective = OBJECTIVES["clip, k1, entropy"]
    agree(run(CASES[name], objective, impl, chunk=16), run(CASES[name], objective, "ref", torch.float64))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["clip, k3, correction", "sequence-clip, everything"])
def test_ratios_to_themselves(name, impl):
    """Without old logprobs: on-policy, at the slope of ratio 1."""
    change = {"old": None}
    found = run(CASES["prime"], OBJECTIVES[name], impl, chunk=8, change=change)
    agree(found, run(CASES["prime"], OBJECTIVES[name], "ref", torch.float64, change=change))


@pytest.mark.parametrize("impl", [*IMPLS, "ref"])
@pytest.mark.parametrize("name", ["clip", "sequence-clip, everything"])
def test_a_mask_is_as_if_the_rows_were_not_there(name, impl):
    case, objective = CASES["prime"], OBJECTIVES[name]
    hidden, head, targets = case.tensors()
    tokens = make_tokens(token_logprob(hidden, head, targets, impl="ref")[0])
    mask = torch.rand(len(hidden), generator=torch.Generator().manual_seed(3)) < 0.4
    dirty = hidden.clone()
    dirty[~mask] = float("nan")
    dirty.requires_grad_()
    head, (weight,) = in_dtype(head, torch.float32)
    loss = grpo_loss(dirty, head, targets, tokens, objective, mask=mask, impl=impl, chunk=4)
    to_hidden, to_weight = torch.autograd.grad(loss.total, [dirty, weight])
    few = hidden[mask].requires_grad_()
    alone = grpo_loss(few, head, targets[mask], tokens.pick(mask), objective, impl="ref")
    expected = torch.autograd.grad(alone.total, [few, weight])
    assert (to_hidden[~mask] == 0).all() and (loss.logprobs[~mask] == 0).all()
    torch.testing.assert_close(to_hidden[mask], expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(to_weight, expected[1], rtol=1e-4, atol=1e-6)
    nothing = grpo_loss(dirty, head, targets, tokens, objective, mask=torch.zeros_like(mask), impl=impl)
    assert float(nothing.total.detach()) == 0
    assert all((g == 0).all() for g in torch.autograd.grad(nothing.total, [dirty, weight]))


@pytest.mark.parametrize("impl", IMPLS)
def test_micro_batches_add_up(impl):
    case, objective = CASES["prime"], OBJECTIVES["clip, k1, entropy"]
    hidden, head, targets = case.tensors()
    tokens = make_tokens(token_logprob(hidden, head, targets, impl="ref")[0])
    whole, (weight,) = in_dtype(head, torch.float32)
    expected = grpo_loss(hidden, whole, targets, tokens, objective, impl=impl)
    expected.total.backward()
    total, summed = 0.0, torch.zeros_like(weight)
    for cut in (slice(0, 1), slice(1, 20), slice(20, 37)):
        part, (own,) = in_dtype(head, torch.float32)
        loss = grpo_loss(hidden[cut], part, targets[cut], tokens.pick(cut), objective, impl=impl)
        loss.total.backward()
        total, summed = total + float(loss.total.detach()), summed + own.grad
    assert total == pytest.approx(float(expected.total.detach()), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(summed, weight.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["clip", "clip, k1, entropy", "sequence-clip, everything"])
@pytest.mark.parametrize("chunk", [24, 1024])
def test_bfloat16_against_float64(name, impl, chunk, products_of_bfloat16):
    """The same inputs in both: no score may be rounded to bfloat16. Gradients are only as fine as their dtype."""
    case, objective = Case(64, 64, 4003, num_banned=2), OBJECTIVES[name]
    exact = run(case, objective, "ref", torch.float64)
    agree(run(case, objective, impl, torch.bfloat16, chunk=chunk), exact, loss=5e-6, gradient=4e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_is_handed_over_scaled_and_once(impl):
    hidden, head, targets = CASES["prime"].tensors()
    tokens = make_tokens(token_logprob(hidden, head, targets, impl="ref")[0])
    head, (weight,) = in_dtype(head, torch.float32)
    loss = grpo_loss(hidden, head, targets, tokens, OBJECTIVES["clip"], impl=impl)
    made = loss.total.grad_fn.gradients[1].data_ptr()
    (loss.total * 1).backward(retain_graph=True)
    assert weight.grad.data_ptr() == made
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.total.backward()
    first = weight.grad.clone()
    weight.grad = None
    (3 * grpo_loss(hidden, head, targets, tokens, OBJECTIVES["clip"], impl=impl).total).backward()
    torch.testing.assert_close(weight.grad, 3 * first)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_is_wanted_is_computed(impl):
    hidden, head, targets = CASES["low rank"].tensors()
    tokens = make_tokens(token_logprob(hidden, head, targets, impl="ref")[0])
    adapted = replace(head, low_rank=replace(head.low_rank, a=head.low_rank.a.clone().requires_grad_()))
    loss = grpo_loss(hidden, adapted, targets, tokens, OBJECTIVES["clip"], impl=impl)
    assert [x is not None for x in loss.total.grad_fn.gradients] == [False, False, True, False]
    assert not grpo_loss(hidden, head, targets, tokens, OBJECTIVES["clip"], impl=impl).total.requires_grad
    with torch.no_grad():
        value = grpo_loss(hidden, adapted, targets, tokens, OBJECTIVES["clip"], impl=impl).total
    assert float(value) == pytest.approx(float(loss.total.detach()), rel=1e-5)


@pytest.mark.parametrize("impl", [*IMPLS, "ref"])
def test_broken_hidden_states_break_the_loss(impl):
    hidden, head, targets = CASES["usual"].tensors()
    tokens = make_tokens(token_logprob(hidden, head, targets, impl="ref")[0])
    hidden[3, 5], hidden[7, 0] = float("nan"), float("inf")
    hidden.requires_grad_()
    loss = grpo_loss(hidden, head, targets, tokens, OBJECTIVES["clip"], impl=impl)
    assert not loss.total.isfinite()
    assert (~(loss.logprobs + loss.entropies).isfinite()).nonzero()[:, 0].tolist() == [3, 7]
    loss.total.backward()
    assert not hidden.grad[3].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_far_off_logprobs_stay_finite(name, impl):
    hidden, head, targets = CASES["usual"].tensors()
    tokens = make_tokens(token_logprob(hidden, head, targets, impl="ref")[0])
    tokens = replace(tokens, old=tokens.old * 50, ref=tokens.ref - 300, rollout=tokens.rollout * 70)
    hidden.requires_grad_()
    loss = grpo_loss(hidden, head, targets, tokens, OBJECTIVES[name], impl=impl)
    loss.total.backward()
    assert loss.total.isfinite() and hidden.grad.isfinite().all()


def test_bad_arguments_are_named():
    hidden, head, targets = CASES["prime"].tensors()
    tokens = make_tokens(torch.zeros(len(hidden)))
    objective = OBJECTIVES["sequence-clip, everything"]
    for name, value, match in (
        ("advantages", tokens.advantages[1:], "advantages"),
        ("weights", tokens.weights.double(), "float64"),
        ("ref", None, "kl_coef.*ref"),
        ("rollout", None, "importance_cap.*rollout"),
        ("sequences", None, "sequences"),
        ("num_sequences", 3, "from 0 to 2"),
        ("old", tokens.old.to("meta"), "meta"),
    ):
        with pytest.raises(ValueError, match=match):
            grpo_loss(hidden, head, targets, replace(tokens, **{name: value}), objective)
    for change in (
        {"policy": "ppo"}, {"kl": "k4"}, {"clip_low": 2.0}, {"clip_high": -1.0}, {"dual_clip": 0.5},
        {"policy": "reinforce", "dual_clip": 3.0}, {"kl_coef": -1.0}, {"entropy_coef": float("nan")},
        {"importance_cap": 0.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=list(change)[-1]):
            Objective(**change)
    with pytest.raises(ValueError, match="impl"):
        grpo_loss(hidden, Head(head.weight), targets, Tokens(tokens.advantages, tokens.weights), Objective(), impl="x")
