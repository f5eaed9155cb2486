"""Features and logits equal transformers' on random weights, in float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vtengine.model import PackedCausal, mrope_positions

TOLERANCE = 1e-5

IMAGES = {
    "none": ([], False),
    "one_tiny": ([(1, 2, 2)], False),
    "one_odd": ([(1, 6, 10)], False),
    "one_wide": ([(1, 10, 26)], False),
    "whole_windows": ([(1, 16, 24)], False),
    "two": ([(1, 10, 26), (1, 6, 10)], False),
    "two_equal": ([(1, 12, 10), (1, 12, 10)], False),
    "adjacent": ([(1, 6, 10), (1, 14, 4), (1, 2, 2)], True),
    "tall": ([(1, 30, 2)], False),
}


def our_logits(model, ids, grids, pixel_values):
    features = model.visual(pixel_values, grids) if grids else None
    positions, _ = mrope_positions(ids, grids, image_token_id=model.config.image_token_id)
    embeds = model.embed(torch.tensor(ids), features)
    return model.logits(model.decode(embeds, positions, PackedCausal([0, len(ids)])))


def their_logits(model, ids, grids, pixel_values):
    tokens = torch.tensor([ids])
    images = {}
    if grids:
        kinds = (tokens == model.config.image_token_id).int()
        images = {"pixel_values": pixel_values, "image_grid_thw": torch.tensor(grids), "mm_token_type_ids": kinds}
    return model(input_ids=tokens, **images).logits[0]


def check(pair, grids, adjacent, pixels, prompt, relative_error):
    ours, theirs = pair
    ids, pixel_values = prompt(grids, adjacent=adjacent), pixels(grids)
    with torch.no_grad():
        if grids:
            expected = theirs.model.visual(pixel_values, grid_thw=torch.tensor(grids)).pooler_output
            assert relative_error(ours.visual(pixel_values, grids), expected) < TOLERANCE
        expected = their_logits(theirs, ids, grids, pixel_values)
        assert relative_error(our_logits(ours, ids, grids, pixel_values), expected) < TOLERANCE


@pytest.mark.parametrize("case", IMAGES)
def test_small_config(case, small_pair, pixels, prompt, relative_error):
    check(small_pair, *IMAGES[case], pixels, prompt, relative_error)


@pytest.mark.parametrize("case", ["none", "two", "adjacent"])
def test_released_head_layouts(case, large_pair, pixels, prompt, relative_error):
    check(large_pair, *IMAGES[case], pixels, prompt, relative_error)


def test_untied_small_head(small_config, build, to_transformers, pixels, prompt, relative_error):
    model = build(dataclasses.replace(small_config, tie_word_embeddings=False), 5)
    check((model, to_transformers(model)), *IMAGES["two"], pixels, prompt, relative_error)


def test_packed_images_equal_single_ones(small_model, pixels, relative_error):
    grids = [(1, 6, 10), (1, 16, 16), (1, 2, 2), (1, 6, 10), (1, 10, 26)]
    pixel_values = pixels(grids)
    with torch.no_grad():
        packed = small_model.visual(pixel_values, grids)
        rows = pixel_values.split([t * h * w for t, h, w in grids])
        single = [small_model.visual(part, [grid]) for part, grid in zip(rows, grids, strict=True)]
    assert relative_error(packed, torch.cat(single)) < 2e-6


def test_packed_sequences_equal_single_ones(small_model, pixels, prompt, relative_error):
    samples = [([(1, 6, 10)], 7), ([], 2), ([(1, 2, 2), (1, 6, 10)], 3), ([], 40), ([(1, 10, 26)], 5)]
    ids, positions, embeds, single, offsets = [], [], [], [], [0]
    with torch.no_grad():
        for seed, (grids, text) in enumerate(samples):
            tokens, pixel_values = prompt(grids, text), pixels(grids, seed)
            single.append(our_logits(small_model, tokens, grids, pixel_values))
            features = small_model.visual(pixel_values, grids) if grids else None
            embeds.append(small_model.embed(torch.tensor(tokens), features))
            positions.append(mrope_positions(tokens, grids, image_token_id=310)[0])
            ids += tokens
            offsets.append(len(ids))
        hidden = small_model.decode(torch.cat(embeds), torch.cat(positions, 1), PackedCausal(offsets))
        packed = small_model.logits(hidden)
    assert relative_error(packed, torch.cat(single)) < 5e-6


def test_compact_patches_equal_full_ones(small_model, pixels, relative_error):
    """A still image repeats its frame: 588 values per patch say the same as 1176."""
    grids = [(1, 6, 10)]
    compact = pixels(grids, dim=588)
    full = compact.view(-1, 3, 1, 196).expand(-1, 3, 2, 196).reshape(-1, 1176)
    with torch.no_grad():
        assert relative_error(small_model.visual(compact, grids), small_model.visual(full, grids)) < 3e-6


def test_several_frames(small_pair, pixels, relative_error):
    ours, theirs = small_pair
    grids = [(3, 6, 10), (1, 4, 4)]
    pixel_values = pixels(grids)
    with torch.no_grad():
        expected = theirs.model.visual(pixel_values, grid_thw=torch.tensor(grids)).pooler_output
        assert relative_error(ours.visual(pixel_values, grids), expected) < TOLERANCE


def test_no_image_has_no_features(small_model):
    assert small_model.visual(torch.zeros(0, 1176), []).shape == (0, 128)


def test_bfloat16_is_near_float32(small_config, build, pixels, prompt, relative_error):
    grids = IMAGES["two"][0]
    ids, pixel_values = prompt(grids), pixels(grids)
    with torch.no_grad():
        exact = our_logits(build(small_config, 0), ids, grids, pixel_values)
        rough = our_logits(build(small_config, 0).to(torch.bfloat16), ids, grids, pixel_values)
    assert rough.dtype == torch.bfloat16
    assert relative_error(rough.float(), exact) < 0.05


@pytest.mark.parametrize(
    ("rows", "columns", "grids", "message"),
    [
        (60, 1176, [(1, 6, 12)], "60 rows"),
        (60, 1000, [(1, 6, 10)], "shape"),
        (15, 1176, [(1, 3, 5)], "multiples of 2"),
        (0, 1176, [(1, 0, 2)], "must be positive"),
    ],
)
def test_bad_pixels_are_named(small_model, rows, columns, grids, message):
    with pytest.raises(ValueError, match=message):
        small_model.visual(torch.zeros(rows, columns), grids)


def test_features_must_fit_the_ids(small_model):
    with pytest.raises(ValueError, match=r"hold 2 ids 310.*3 rows"):
        small_model.embed(torch.tensor([1, 310, 310, 2]), torch.zeros(3, 128))
