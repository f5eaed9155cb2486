"""The module that serves also trains: gradients equal transformers', through the visual features into the tower."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vtengine.model import PackedCausal, Qwen2_5_VL, checkpoint_name, hf_tensors, mrope_positions

GRIDS = [(1, 6, 10), (1, 10, 18)]


def loss_of(model, ids, pixel_values):
    features = model.visual(pixel_values, GRIDS)
    positions, _ = mrope_positions(ids, GRIDS, image_token_id=model.config.image_token_id)
    hidden = model.decode(model.embed(torch.tensor(ids), features), positions, PackedCausal([0, len(ids)]))
    return F.cross_entropy(model.logits(hidden)[:-1], torch.tensor(ids[1:]))


def test_gradients_equal_transformers(small_pair, pixels, prompt):
    ours, theirs = small_pair
    ids, pixel_values = prompt(GRIDS), pixels(GRIDS)
    loss = loss_of(ours, ids, pixel_values)
    tokens = torch.tensor([ids])
    kinds = (tokens == 310).int()
    expected = theirs(
        input_ids=tokens,
        pixel_values=pixel_values,
        image_grid_thw=torch.tensor(GRIDS),
        mm_token_type_ids=kinds,
        labels=tokens,
    ).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    mine = hf_tensors(ours, of=lambda parameter: parameter.grad)
    seen = set()
    for name, parameter in theirs.named_parameters():
        key = checkpoint_name(name)
        seen.add(key)
        scale = max(parameter.grad.abs().max().item(), 1e-3)
        assert (mine[key] - parameter.grad).abs().max().item() < 5e-5 * scale, name
    assert seen == set(mine)
    ours.zero_grad(set_to_none=True)
    theirs.zero_grad(set_to_none=True)


def test_it_learns_under_autocast(small_config, build, pixels, prompt):
    """Products have 16 bits then, and what they are added to has float32."""
    model, ids, pixel_values = build(small_config, 3), prompt(GRIDS), pixels(GRIDS)
    exact = loss_of(model, ids, pixel_values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, ids, pixel_values)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.02) and loss.item() != exact.item()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_training_after_inference_mode(small_config, build, pixels, prompt):
    """Cached index tensors made while serving must not poison a later backward pass."""
    grids = [(1, 4, 22), (1, 6, 26), (1, 8, 2)]  # used nowhere else, so that this test fills the caches
    model, ids, pixel_values = build(small_config, 3), prompt(grids), pixels(grids)
    context = PackedCausal([0, 9, 40, len(ids)])
    positions, _ = mrope_positions(ids, grids, image_token_id=310)

    def run():
        embeds = model.embed(torch.tensor(ids), model.visual(pixel_values, grids))
        return model.decode(embeds, positions, context).square().mean()

    with torch.inference_mode():
        served = run()
    trained = run()
    trained.backward()
    assert trained.item() == pytest.approx(served.item(), rel=1e-6)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compact_patches_train_the_patch_weight(small_config, build, pixels):
    model = build(small_config, 4)
    model.visual(pixels([(1, 4, 4)], dim=588), [(1, 4, 4)]).square().sum().backward()
    grad = model.visual.patch_embed.weight.grad.view(128, 3, 2, 196)
    assert grad.abs().max() > 0
    assert torch.equal(grad[:, :, 0], grad[:, :, 1])


def test_build_is_seeded_and_scaled_by_fan_in(small_config):
    model, again, other = (Qwen2_5_VL.build(small_config, seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.ndim == 2:
            assert not torch.equal(a, c), name
            assert a.std().item() == pytest.approx(a.shape[1] ** -0.5, rel=0.05), name
        else:
            assert (a == (0.0 if name.endswith("bias") else 1.0)).all(), name
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
