"""Liger's loss for Hopper behind token_logprob and grpo_loss.

Without it the adapter talks to a stand-in that rounds where the package's sources round, and insists on the arguments
that they ask for. The tests marked gpu run the package itself, where it is there.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from vtengine_kernels.grpo_loss import grpo_loss
from vtengine_kernels.grpo_loss.cases import OBJECTIVES, make_tokens
from vtengine_kernels.token_logprob import LowRank, liger, token_logprob
from vtengine_kernels.token_logprob.cases import Case

from tests.kernels.test_token_logprob import distance

MODULE = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
CASE = Case(1100, 61, 1013, temperature=0.9)  # more rows than are added up at once


class StandIn(torch.autograd.Function):
    """The signature and the roundings of `LigerFusedScaledCrossEntropySM90Function`."""

    @staticmethod
    def forward(
        ctx, _input, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1, return_entropy=False,
        selected_token_ids=None,
    ):  # fmt: skip
        assert _input.dtype == weight.dtype == torch.bfloat16 and target.dtype == torch.int64
        assert _input.ndim == weight.ndim == 2 and target.shape == _input.shape[:1] and len(_input)
        assert _input.shape[1] == weight.shape[1] and not _input.data_ptr() % 16 and not weight.data_ptr() % 16
        assert isinstance(temperature, float) and m_tiles_per_cluster == 1 and return_entropy is True
        assert selected_token_ids is None and not (target == ignore_index).any()
        ctx.set_materialize_grads(False)
        logp = StandIn.logp(_input, weight, temperature)
        entropy = -(logp.exp() * logp).sum(1).bfloat16()
        ctx.save_for_backward(_input, weight, target, entropy)
        ctx.temperature = temperature
        return -logp.gather(1, target[:, None])[:, 0], entropy

    @staticmethod
    def logp(x, weight, temperature):
        return ((x.float() @ weight.float().t()).half().float() / temperature).log_softmax(1)

    @staticmethod
    def backward(ctx, to_negative, to_entropy):
        x, weight, target, entropy = ctx.saved_tensors
        assert to_negative.shape == target.shape
        logp = StandIn.logp(x, weight, ctx.temperature)
        slopes = logp.exp() * to_negative[:, None]
        slopes.scatter_add_(1, target[:, None], -to_negative[:, None])
        if to_entropy is not None:
            assert to_entropy.dtype == torch.bfloat16
            slopes -= logp.exp() * (logp + entropy.float()[:, None]) * to_entropy.float()[:, None]
        slopes = (slopes / ctx.temperature).bfloat16().float()
        of_weight = torch.zeros_like(weight)
        for some, rows in zip(slopes.split(1024), x.split(1024), strict=True):
            of_weight += (some.t() @ rows.float()).bfloat16()
        return (slopes @ weight.float()).bfloat16(), of_weight, None, None, None, None, None, None


@pytest.fixture
def installed(monkeypatch):
    """The package, as a stand-in that runs anywhere."""
    monkeypatch.setitem(sys.modules, MODULE, SimpleNamespace(LigerFusedScaledCrossEntropySM90Function=StandIn))
    monkeypatch.setattr(liger, "missing", lambda: None)
    monkeypatch.setattr(liger, "takes", lambda hidden: hidden.dtype == torch.bfloat16)
    liger._function.cache_clear()
    yield
    liger._function.cache_clear()


def run(objective, impl, dtype=torch.bfloat16, device="cpu", masked=False, case=CASE):
    """[total, logprobs, gradients of hidden and weight, entropies] in float64 on the CPU."""
    hidden, head, targets = case.tensors(dtype)
    logprobs, _ = token_logprob(hidden.double(), replace(head, weight=head.weight.double()), targets)
    tokens = make_tokens(logprobs, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    moved = {name: x.to(device) for name, x in vars(tokens).items() if isinstance(x, torch.Tensor)}
    hidden, weight = hidden.to(device).requires_grad_(), head.weight.to(device).requires_grad_()
    mask = torch.arange(case.rows, device=device) % 3 == 0 if masked else None
    head, tokens = replace(head, weight=weight), replace(tokens, **moved)
    loss = grpo_loss(hidden, head, targets.to(device), tokens, objective, mask=mask, impl=impl)
    gradients = torch.autograd.grad(loss.total, [hidden, weight])
    if masked:
        assert not gradients[0][~mask].any()
    return [x.detach().double().cpu() for x in (loss.total, loss.logprobs, *gradients, loss.entropies)]


def errs_no_more_than_torch(objective, device="cpu", **options):
    exact = run(objective, "ref", torch.float64, **options)
    torchs = run(objective, "ref", device=device, **options)
    total, *found, entropies = run(objective, "liger", device=device, **options)
    assert abs(total - exact[0]) <= 3e-4 * max(1.0, abs(exact[0]))  # of scores in float16
    for one, other, true in zip(found, torchs[1:-1], exact[1:-1], strict=True):
        assert one.shape == true.shape
        assert distance(one, true) <= distance(other, true)
    assert distance(entropies, exact[-1]) <= 2**-8 * float(exact[-1].norm())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_through_the_adapter(installed, name, masked):
    errs_no_more_than_torch(OBJECTIVES[name], masked=masked)


def test_an_older_package_without_these_kernels_is_missing(monkeypatch):
    """The package and what it compiles with are there, and import; the module of the kernels is not."""
    for name in ("liger_kernel", "cutlass"):
        older = ModuleType(name)
        older.__path__ = []
        monkeypatch.setitem(sys.modules, name, older)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    liger._function.cache_clear()
    assert "liger-kernel[cutedsl]>=0.8.5" in liger.missing.__wrapped__()


def test_no_rows(installed):
    hidden, head, targets = Case(0, 8, 16).tensors(torch.bfloat16)
    assert [x.shape for x in token_logprob(hidden, head, targets, impl="liger")] == [(0,), (0,)]


def test_states_that_begin_between_aligned_bytes(installed):
    """A view is copied: the stand-in, as the kernels' bulk copies, takes multiples of 16 bytes only."""
    hidden, head, targets = CASE.tensors(torch.bfloat16)
    assert hidden[1:].data_ptr() % 16
    token_logprob(hidden[1:], head, targets[1:], impl="liger")


def test_what_a_head_may_not_have(installed):
    hidden, head, targets = CASE.tensors(torch.bfloat16)
    low_rank = LowRank(torch.zeros(2, CASE.size), torch.zeros(CASE.vocabulary, 2))
    for name, value in (("soft_cap", 5.0), ("banned", torch.tensor([1])), ("low_rank", low_rank)):
        with pytest.raises(ValueError, match=f"head.{name} is set: must be None for impl = 'liger'"):
            token_logprob(hidden, replace(head, **{name: value}), targets, impl="liger")
    with pytest.raises(ValueError, match=r"impl = 'liger' takes no torch.float32"):
        token_logprob(hidden.float(), replace(head, weight=head.weight.float()), targets, impl="liger")


def test_auto_takes_no_liger(installed, monkeypatch):
    monkeypatch.setattr(liger, "token_logprob", None)
    token_logprob(*CASE.tensors(torch.bfloat16))


def test_what_is_missing_is_said(monkeypatch):
    if not torch.cuda.is_available():
        assert liger.missing() == "no CUDA device here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    liger._function.cache_clear()
    assert "pip install 'liger-kernel[cutedsl]" in liger.missing.__wrapped__()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert "a GPU is no Hopper" in liger.missing.__wrapped__()


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["clip, k1, entropy", "sequence-clip", "clip, k3, correction"])
def test_on_the_gpu_it_errs_no_more_than_torch(name, masked):
    if liger.missing() is not None:
        pytest.skip(liger.missing())
    errs_no_more_than_torch(OBJECTIVES[name], "cuda", masked=masked)


@pytest.mark.gpu
def test_on_the_gpu_in_whole_tiles():
    if liger.missing() is not None:
        pytest.skip(liger.missing())
    errs_no_more_than_torch(OBJECTIVES["clip, k3, correction"], "cuda", case=Case(2048, 128, 4096))


@pytest.mark.gpu
def test_on_the_gpu_what_is_broken_shows():
    if liger.missing() is not None:
        pytest.skip(liger.missing())
    hidden, head, targets = CASE.tensors(torch.bfloat16)
    hidden, targets, head = hidden.cuda(), targets.cuda(), replace(head, weight=head.weight.cuda())
    clean = token_logprob(hidden, head, targets, impl="liger")
    hidden[3] = float("nan")
    for broken, whole in zip(token_logprob(hidden, head, targets, impl="liger"), clean, strict=True):
        assert not broken[3].isfinite()
        assert torch.equal(broken[4:], whole[4:]) and torch.equal(broken[:3], whole[:3])
