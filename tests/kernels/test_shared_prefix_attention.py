"""shared_prefix_attention: plain causal attention over every path of the tree, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vtengine_kernels.shared_prefix_attention import PrefixTree, flash, shared_prefix_attention, tiles
from vtengine_kernels.shared_prefix_attention.cases import CASES, Case

from tests.kernels.flash_stand_in import stand_in

FULL = [name for name in CASES if name != "empty"]


def path_by_path(q, k, v, tree):
    """The truth: each segment's whole path as one sequence of its own, plain causal attention, float64."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = []
    for segment, above in enumerate(tree.ancestors):
        spans = [(tree.offsets[s], tree.offsets[s + 1]) for s in (*above, segment)]
        rows = torch.cat([torch.arange(*span) for span in spans])
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[rows].repeat_interleave(group, 1)) * q.shape[2] ** -0.5
        scores = scores.masked_fill(torch.ones(len(rows), len(rows)).triu(1).bool(), float("-inf"))
        whole = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[rows].repeat_interleave(group, 1))
        out.append(whole[len(rows) - tree.lengths[segment] :])
    return torch.cat(out)


def run(attend, case, dtype=torch.float32):
    """(output, gradients of q, k and v) under a fixed weighting of the output."""
    q, k, v = (x.detach().clone().requires_grad_() for x in case.tensors(dtype))
    out = attend(q, k, v, case.tree)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out.detach(), *torch.autograd.grad((out * weight.to(out)).sum(), (q, k, v))


def worst(found, exact, least=1e-9):
    """The largest error over values and gradients, each against its own norm, or `least` where that is less."""
    pairs = [(ours.double(), true.double()) for ours, true in zip(found, exact, strict=True)]
    return max(float((ours - true).norm() / true.norm().clamp_min(least)) for ours, true in pairs)


@pytest.mark.parametrize("impl", ["tiles", "ref"])
@pytest.mark.parametrize("name", FULL)
def test_exact_in_float32_and_gradients_too(name, impl):
    case = CASES[name]
    found = run(lambda *x: shared_prefix_attention(*x, impl=impl), case)
    assert found[0].shape == (case.tree.num_tokens, case.heads, case.size)
    assert worst(found, run(path_by_path, case)) <= 1e-6


@pytest.mark.parametrize("name", ["nested", "prime"])
def test_exact_in_float64(name):
    found = run(shared_prefix_attention, CASES[name], torch.float64)
    assert worst(found, run(path_by_path, CASES[name], torch.float64)) <= 1e-13


def test_sixteen_bits_err_no_more_than_torch():
    case = CASES["nested"]
    exact = run(path_by_path, case, torch.bfloat16)
    ours = run(lambda *x: shared_prefix_attention(*x, impl="tiles"), case, torch.bfloat16)
    torchs = run(lambda *x: shared_prefix_attention(*x, impl="ref"), case, torch.bfloat16)
    assert ours[0].dtype == torch.bfloat16
    assert worst(ours, exact) <= worst(torchs, exact)


@settings(max_examples=25)
@given(st.data())
def test_any_tree(data):
    parents: list[int] = []
    path: list[int] = []
    for segment in range(data.draw(st.integers(1, 7))):
        path = path[: data.draw(st.integers(0, len(path)))]
        parents.append(path[-1] if path else -1)
        path.append(segment)
    lengths = tuple(data.draw(st.integers(1, 20)) for _ in parents)
    case = Case(lengths, tuple(parents), heads=2, kv_heads=1, size=16)
    assert worst(run(shared_prefix_attention, case, torch.float64), run(path_by_path, case, torch.float64)) <= 1e-12


@pytest.mark.parametrize("name", FULL)
def test_the_flash_plan_with_its_kernels_stood_in_for(name, monkeypatch):
    """Calls per level, merge by log-sum-exp and backward from the merged one; the CUDA kernels computed in torch."""
    stand_in(monkeypatch)
    case = CASES[name]
    found = run(lambda *x: shared_prefix_attention(*x, impl="flash"), case, torch.float64)
    # Merging is done with a float32 log-sum-exp, as the kernels give it.
    assert worst(found, run(path_by_path, case, torch.float64)) <= 1e-6


def test_one_flash_call_per_level():
    calls = flash.plan(CASES["nested"].tree, torch.device("cpu"))
    assert [call.causal for call in calls] == [True, False, False, False]
    assert calls[1].queries == slice(19, 200) and calls[1].keys == slice(0, 19)
    assert calls[1].query_offsets.tolist() == [0, 181] and calls[1].key_offsets.dtype == torch.int32
    assert flash.plan(CASES["two groups"].tree, torch.device("cpu"))[1].query_offsets.tolist() == [0, 12, 27]
    assert len(flash.plan(CASES["unrelated"].tree, torch.device("cpu"))) == 1


def test_tiles_keep_to_their_budget_and_cover_every_token_once():
    for case in (CASES["nested"], CASES["long"], Case((1500, *[40] * 30), (-1, *[0] * 30), heads=16)):
        found = tiles.plan(case.tree, case.heads, torch.device("cpu"))
        assert [tile.begin for tile in found] == [0, *(tile.end for tile in found[:-1])]
        assert found[-1].end == case.tree.num_tokens
        for tile in found:
            rows = tile.end - tile.begin
            assert rows <= tiles.MAX_ROWS
            assert rows <= tiles.MIN_ROWS or rows * tile.num_keys * case.heads <= tiles.TILE_SCORES


def test_empty_pack():
    q, k, v = (x.requires_grad_() for x in CASES["empty"].tensors())
    out = shared_prefix_attention(q, k, v, CASES["empty"].tree)
    assert out.shape == (0, 4, 64)
    out.sum().backward()


def test_bad_arguments_are_named():
    q, k, v = CASES["group"].tensors()
    tree = CASES["group"].tree
    with pytest.raises(ValueError, match=r"k \[97, 2, 64\], v \[96, 2, 64\]"):
        shared_prefix_attention(q, k, v[1:], tree)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        shared_prefix_attention(q[:, :3], k, v, tree)
    for no_heads in (slice(None), slice(0)), (slice(None), slice(None), slice(0)):
        with pytest.raises(ValueError, match="multiple of Hkv"):
            shared_prefix_attention(q[..., : k[no_heads].shape[2]], k[no_heads], v[no_heads], tree)
    with pytest.raises(ValueError, match="97 tokens, but the tree's segments hold 3"):
        shared_prefix_attention(q, k, v, PrefixTree((3,), (-1,)))
    with pytest.raises(ValueError, match=r"k torch.float64"):
        shared_prefix_attention(q, k.double(), v, tree)
    with pytest.raises(ValueError, match="k on meta"):
        shared_prefix_attention(q, k.to("meta"), v, tree)
    with pytest.raises(ValueError, match="impl = 'gpu'"):
        shared_prefix_attention(q, k, v, tree, impl="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA device"):
            shared_prefix_attention(q, k, v, tree, impl="flash")


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ((3, 4), (-1,), "2 lengths for 1 parents"),
        ((3, 0), (-1, 0), r"lengths\[1\] = 0"),
        ((3, 4), (-1, 1), r"parents\[1\] = 1"),
        ((3,), (0,), r"parents\[0\] = 0"),
        ((1, 1, 1, 1), (-1, 0, -1, 0), r"parents\[3\] = 0.*depth-first"),
    ],
)
def test_bad_trees(lengths, parents, message):
    with pytest.raises(ValueError, match=message):
        PrefixTree(lengths, parents)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FULL)
def test_flash_errs_no_more_than_torch(name, dtype):
    case = CASES[name]
    exact = [x.cpu() for x in run(path_by_path, case, dtype)]

    def on_gpu(impl):
        def attend(q, k, v, tree):
            return shared_prefix_attention(q.cuda(), k.cuda(), v.cuda(), tree, impl=impl).cpu()

        return run(attend, case, dtype)

    # with a single key the gradients of q and k are 0, and come out as a rounding error that has nothing to be held to
    assert worst(on_gpu("flash"), exact, 0.01) <= 1.5 * worst(on_gpu("ref"), exact, 0.01) + 1e-3
