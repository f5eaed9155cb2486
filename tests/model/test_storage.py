"""Weights that lie in memory as they are read fastest: the same model, by values, names, updates and files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from vtengine.model import checkpoint, hf_tensors, load_model, load_tensors, save_model, store_aligned, store_by_column
from vtengine.model.layers import SwiGLU


def same(a, b):
    left, right = hf_tensors(a), hf_tensors(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_stored_by_column_it_is_the_same_model(small_config, build, tmp_path, monkeypatch):
    monkeypatch.setattr("vtengine.model.linear.onednn_is_better", lambda weight: False)
    model, plain, newer = build(small_config, 0), build(small_config, 0), build(small_config, 1)
    store_by_column(model)
    assert model.layers[0].attn.qkv.weight.stride(0) == 1
    assert same(model, plain)
    x = torch.randn(9, small_config.text.hidden_size)
    with torch.inference_mode():
        torch.testing.assert_close(model.layers[0].mlp(x), plain.layers[0].mlp(x), atol=1e-5, rtol=1e-5)
    load_tensors(model, dict(hf_tensors(newer)))
    assert same(model, newer)
    assert model.layers[0].attn.qkv.weight.stride(0) == 1
    save_model(model, tmp_path)
    assert same(load_model(tmp_path), newer)


def test_stored_in_whole_pieces_it_is_the_same_model(small_config, build, tmp_path, monkeypatch):
    """On the CPU, where nothing asks for it, with rows that are made to lack three numbers."""
    monkeypatch.setattr("vtengine.model.layers._to_whole_pieces", lambda weight: 3)
    model, plain, newer = build(small_config, 0), build(small_config, 0), build(small_config, 1)
    store_aligned(model)
    mlp = model.visual.blocks[0].mlp
    inner = small_config.vision.intermediate_size
    assert mlp.down.weight.shape[1] == inner and mlp.down.weight.stride() == (inner + 3, 1)
    assert same(model, plain) and list(model.state_dict()) == list(plain.state_dict())
    address = mlp.down.weight.data_ptr()
    store_aligned(model)  # by a second engine, while graphs of the first hold addresses
    assert mlp.down.weight.data_ptr() == address
    load_tensors(model, dict(hf_tensors(newer)))
    assert same(model, newer) and mlp.down.weight.stride(0) == inner + 3
    save_model(model, tmp_path)
    assert same(load_model(tmp_path), newer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_behind_rows_change_no_bit(dtype, monkeypatch):
    """Numbers whose sums are exact in any order: only a product with something else than zeros could differ."""
    plain, generator = SwiGLU(6, 13, bias=True).to(dtype), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
        plain.gate_up.weight[:13], plain.gate_up.bias[:13] = 0, 64.0  # whose silu is 64
    x = torch.randint(-2, 3, (9, 6), generator=generator).to(dtype)
    exact = plain(x)
    gradients = torch.autograd.grad(exact.sum(), list(plain.parameters()))
    seen: list[tuple[torch.Size, int]] = []

    def watched(x, weight, bias):
        seen.append((weight.shape, weight.untyped_storage().data_ptr()))
        assert (x[:, 13:] == 0).all() and (weight[:, 13:] == 0).all()
        return F.linear(x, weight, bias)

    monkeypatch.setattr("vtengine.model.layers.linear", watched)
    monkeypatch.setattr("vtengine.model.layers._to_whole_pieces", lambda weight: 3)
    aligned = copy.deepcopy(plain)
    store_aligned(aligned)
    copied = copy.deepcopy(aligned)  # to another memory, without what lay behind
    for module in (plain, aligned, copied):
        with torch.inference_mode():
            assert torch.equal(module(x), exact)
        found = torch.autograd.grad(module(x).sum(), list(module.parameters()))
        assert all(torch.equal(one, other) for one, other in zip(found, gradients, strict=True))
    assert [shape for shape, _ in seen] == [(6, 16)] * 6
    assert [
        module.down.weight.untyped_storage().data_ptr() == seen[2 * i][1] for i, module in enumerate((plain, aligned))
    ] == [False, True]


def test_a_reader_of_a_checkpoint_lives_for_a_few_tensors(small_model, tmp_path, monkeypatch):
    """What it read of the file is memory of this process until then."""
    save_model(small_model, tmp_path, shard_bytes=1 << 20)
    opened = []
    monkeypatch.setattr(checkpoint, "TENSORS_PER_READER", 3)
    monkeypatch.setattr(
        checkpoint, "_reading", lambda file, real=checkpoint._reading: opened.append(file) or real(file)
    )
    found = checkpoint.Checkpoint.open(tmp_path)
    opened.clear()
    read = dict(found.tensors())
    assert len(read) == len(hf_tensors(small_model)) and len(opened) >= len(read) / 3
    assert len(opened) <= len(read) / 3 + len(set(opened))
    assert same(load_model(tmp_path), small_model)
