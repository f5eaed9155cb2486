"""Attention contexts against a plain softmax, at ragged lengths, with gradients; the flash path's call."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.kernels.flash_stand_in import stand_in
from vtengine.model import PackedCausal, attention, plain_attention
from vtengine.model.attention import PADDING_LIMIT, Runs, dense_attention

LENGTHS = [[5], [4, 4, 4], [1, 1], [1, 7, 7, 30, 2, 6, 29], [64, 1], [3, 100, 98, 97]]


def plain(q, k, v, lengths, causal):
    """Each sequence by itself, in float64, one head at a time."""
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        for head in range(q.shape[1]):
            scores = q[rows, head].double() @ k[rows, head // group].double().T / q.shape[-1] ** 0.5
            if causal:
                scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
            out[rows, head] = scores.softmax(-1) @ v[rows, head // group].double()
        begin += length
    return out


def qkv(total, heads, kv_heads, size=32):
    generator = torch.Generator().manual_seed(total)
    fused = torch.randn(total, heads + 2 * kv_heads, size, generator=generator, requires_grad=True)
    return (fused, *fused.split([heads, kv_heads, kv_heads], 1))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (2, 2)])
def test_packed_causal(lengths, heads, kv_heads):
    fused, q, k, v = qkv(sum(lengths), heads, kv_heads)
    offsets = [0, *itertools.accumulate(lengths)]
    out = PackedCausal(offsets).attend(0, q, k, v)
    expected = plain(q, k, v, lengths, causal=True)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)

    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (ours,) = torch.autograd.grad((out * weight).sum(), fused)
    (exact,) = torch.autograd.grad((expected * weight).sum(), fused)
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-4)


def test_offsets_may_be_a_tensor():
    _, q, k, v = qkv(7, 2, 1)
    by_tensor = PackedCausal(torch.tensor([0, 3, 7], dtype=torch.int32)).attend(0, q, k, v)
    assert torch.equal(by_tensor, PackedCausal([0, 3, 7]).attend(0, q, k, v))


@pytest.mark.parametrize("offsets", [[], [0], [1, 3], [0, 3, 3], [0, 4, 2]])
def test_bad_offsets(offsets):
    with pytest.raises(ValueError, match="ascending token offsets"):
        PackedCausal(offsets)


def test_wrong_number_of_tokens():
    _, q, k, v = qkv(6, 2, 1)
    with pytest.raises(ValueError, match="6 tokens, but cu_seqlens ends at 7"):
        PackedCausal([0, 3, 7]).attend(0, q, k, v)


def test_padding_is_bounded():
    offsets = [0, *itertools.accumulate([1, 3, 5, 50, 64, 64, 200, 199, 7, 48])]
    plan = attention._Padded.plan(offsets, torch.device("cpu"))
    for rows in plan.batches:
        used = len(rows.unique())
        assert used >= (1 - PADDING_LIMIT) * rows.numel()
    assert len(plan.batches) < 10


def test_plain_attention_holds_for_its_thread_alone(monkeypatch):
    """An engine's thread goes on with the fast kernel while a learner's is inside."""
    q, k, v = (torch.randn(2, 9, heads, 8) for heads in (4, 2, 2))
    fast = attention.batched_attention(q, k, v, causal=True)
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda *a, **b: calls.append(1) or kernel(*a, **b))
    with plain_attention():
        found = attention.batched_attention(q, k, v, causal=True)
        assert not calls
        with ThreadPoolExecutor(1) as other:
            beside = other.submit(attention.batched_attention, q, k, v, True).result()
        assert len(calls) == 1
    attention.batched_attention(q, k, v, causal=True)
    assert len(calls) == 2
    assert torch.equal(beside, fast)
    torch.testing.assert_close(found, fast)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(attention.batched_attention(q, k, v, causal=True), found)


def test_dense_runs():
    runs = Runs(((16, 3), (5, 1), (2, 2)))
    _, q, k, v = qkv(runs.total, 2, 2)
    torch.testing.assert_close(
        dense_attention(q, k, v, runs).double(), plain(q, k, v, runs.lengths, causal=False), atol=2e-6, rtol=1e-5
    )


def test_flash_call(monkeypatch):
    """Where flash-attn can run, ragged and equal lengths go to it in one call with int32 offsets."""
    calls = []

    def flash(q, k, v, offsets, longest, causal):
        calls.append((offsets.tolist(), offsets.dtype, longest, causal))
        return q.clone()

    monkeypatch.setattr(attention, "_varlen", lambda q: flash)
    _, q, k, v = qkv(7, 2, 1)
    PackedCausal([0, 3, 7]).attend(0, q, k, v)
    dense_attention(q, k, v, Runs(((2, 3), (1, 1))))
    assert calls == [([0, 3, 7], torch.int32, 4, True), ([0, 2, 4, 6, 7], torch.int32, 2, False)]


def test_a_stream_has_offsets_of_its_own(monkeypatch):
    """The copy is on its way in one stream; another, the vision tower's, does not wait for it."""
    used = []
    monkeypatch.setattr(attention, "_varlen", lambda q: lambda q, k, v, offsets, longest, causal: used.append(offsets))
    _, q, k, v = qkv(4, 2, 1)
    for stream in (1, 2, 1):
        monkeypatch.setattr(attention, "_current_stream", lambda device, stream=stream: stream)
        dense_attention(q, k, v, Runs(((4, 1),)))
    assert used[0] is used[2] is not used[1] and torch.equal(used[0], used[1])


def test_flash_is_not_for_cpu_tensors():
    assert attention._varlen(torch.zeros(1, 1, 8, dtype=torch.bfloat16)) is None


def test_torchs_own_flash_is_taken_where_there_is_no_package(monkeypatch):
    """On Hopper scaled_dot_product_attention would build a cuDNN plan for every new length."""
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(5, 2, 64))
    package = object()
    monkeypatch.setattr(attention, "_flash_attn", lambda: package)
    assert attention._varlen(on_gpu) is package
    monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    monkeypatch.setattr(attention.flash, "missing", lambda: None)
    assert attention._varlen(on_gpu) is attention._torchs_flash
    for change in ({"dtype": torch.float32}, {"shape": (5, 2, 60)}, {"shape": (5, 2, 512)}, {"is_cuda": False}):
        assert attention._varlen(SimpleNamespace(**{**vars(on_gpu), **change})) is None, change
    monkeypatch.setattr(attention.flash, "missing", lambda: "too old a GPU")
    assert attention._varlen(on_gpu) is None


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_torchs_own_flash_as_it_is_called(monkeypatch, lengths, causal):
    stand_in(monkeypatch)
    monkeypatch.setattr(attention, "_varlen", lambda q: attention._torchs_flash)
    _, q, k, v = qkv(sum(lengths), 4, 2)
    if causal:
        out = PackedCausal([0, *itertools.accumulate(lengths)]).attend(0, q, k, v)
    else:
        out = dense_attention(q, k, v, Runs(tuple((length, 1) for length in lengths)))
    torch.testing.assert_close(out.double(), plain(q, k, v, lengths, causal), atol=2e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("size", [32, 80, 128])
def test_flash_on_the_gpu_errs_no_more_than_rounding(lengths, size):
    """Values and gradients of bfloat16, against float64 on the same numbers; the vision tower's heads have 80."""
    q, k, v = (x.detach().bfloat16() for x in qkv(sum(lengths), 4, 2, size)[1:])
    runs = Runs(tuple((length, 1) for length in lengths))
    for causal in (True, False):
        moved = [x.cuda().requires_grad_() for x in (q, k, v)]
        assert attention._varlen(moved[0]) is not None
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        out, true = dense_attention(*moved, runs, causal), plain(*exact, lengths, causal)
        assert (out.double().cpu() - true).norm() <= 1e-2 * true.norm()
        weight = torch.randn(true.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        found = torch.autograd.grad((out * weight.cuda()).sum(), moved)
        wanted = torch.autograd.grad((true * weight.double()).sum(), exact)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours.double().cpu() - theirs).norm() <= 2e-2 * theirs.norm() + 1e-2
