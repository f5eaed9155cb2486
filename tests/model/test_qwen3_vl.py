"""Qwen3-VL: config, features, logits and gradients equal transformers' on random weights, in float32."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.tiny_model import PAD, QWEN3_VISION, config_of, qwen3_text
from vtengine.model import (
    ModelConfig,
    ModelLoadError,
    PackedCausal,
    Qwen3_VL,
    Qwen3TextConfig,
    Qwen3VisionConfig,
    VisionConfig,
    checkpoint_name,
    hf_tensors,
    load_model,
    load_tensors,
    mrope_positions,
    save_model,
)

CONFIG = config_of(qwen3_text(), QWEN3_VISION)
TOLERANCE = 1e-5

IMAGES = {
    "none": ([], False),
    "one_tiny": ([(1, 2, 2)], False),
    "larger_than_the_positions": ([(1, 16, 24)], False),
    "two": ([(1, 10, 26), (1, 6, 10)], False),
    "two_equal": ([(1, 12, 10), (1, 12, 10)], False),
    "adjacent": ([(1, 6, 10), (1, 14, 4), (1, 2, 2)], True),
}


@pytest.fixture(scope="module")
def pair(build, to_transformers):
    model = build(CONFIG, 0)
    return model, to_transformers(model)


def released_heads():
    """Head sizes of the 8B checkpoint (text 128, vision 72), two layers, narrow feed-forward."""
    vision = Qwen3VisionConfig(depth=2, intermediate_size=96, out_hidden_size=256, deepstack_visual_indexes=(1,))
    text = Qwen3TextConfig(vocab_size=320, hidden_size=256, intermediate_size=96, num_layers=2, num_heads=8)
    return dataclasses.replace(CONFIG, vision=vision, text=text, tie_word_embeddings=False)


def hidden_of(model, ids, grids, pixel_values, rows=None):
    features = model.visual(pixel_values, grids) if grids else None
    positions, _ = mrope_positions(ids, grids, image_token_id=PAD)
    return model.decode(model.embed(torch.tensor(ids), features), positions, PackedCausal([0, len(ids)]), rows)


def inputs_of(ids, grids, pixel_values):
    tokens = torch.tensor([ids])
    if not grids:
        return {"input_ids": tokens}
    images = {"pixel_values": pixel_values, "image_grid_thw": torch.tensor(grids)}
    return {"input_ids": tokens, **images, "mm_token_type_ids": (tokens == PAD).int()}


def check(pair, grids, adjacent, pixels, prompt, relative_error):
    ours, theirs = pair
    ids, pixel_values = prompt(grids, adjacent=adjacent), pixels(grids, dim=1536)
    with torch.no_grad():
        if grids:
            out = theirs.model.visual(pixel_values, grid_thw=torch.tensor(grids))
            expected = torch.cat([out.pooler_output, *out.deepstack_features], 1)
            assert relative_error(ours.visual(pixel_values, grids), expected) < TOLERANCE
        expected = theirs(**inputs_of(ids, grids, pixel_values)).logits[0]
        assert relative_error(ours.logits(hidden_of(ours, ids, grids, pixel_values)), expected) < TOLERANCE


@pytest.mark.parametrize("case", IMAGES)
def test_small_config(case, pair, pixels, prompt, relative_error):
    check(pair, *IMAGES[case], pixels, prompt, relative_error)


def test_released_head_layout(build, to_transformers, pixels, prompt, relative_error):
    model = build(released_heads(), 5)
    check((model, to_transformers(model)), *IMAGES["two"], pixels, prompt, relative_error)


def test_deepstack_features_reach_the_layers(pair, pixels, prompt, relative_error):
    """The parity tests would pass without them if the random mergers gave next to nothing."""
    ours, _ = pair
    grids = IMAGES["two"][0]
    ids, features = prompt(grids), ours.visual(pixels(grids, dim=1536), grids)
    positions, _ = mrope_positions(ids, grids, image_token_id=PAD)
    with torch.no_grad():
        whole, plain = (
            ours.decode(ours.embed(torch.tensor(ids), part), positions, PackedCausal([0, len(ids)]))
            for part in (features, features[:, :64])
        )
    assert relative_error(plain, whole) > 0.05


def test_several_frames_and_packed_images(pair, pixels, relative_error):
    ours, theirs = pair
    grids = [(3, 6, 10), (1, 4, 4), (1, 6, 10)]
    pixel_values = pixels(grids, dim=1536)
    with torch.no_grad():
        packed = ours.visual(pixel_values, grids)
        assert relative_error(packed[:, :64], theirs.model.visual(pixel_values, torch.tensor(grids)).pooler_output) < (
            TOLERANCE
        )
        rows = pixel_values.split([t * h * w for t, h, w in grids])
        single = [ours.visual(part, [grid]) for part, grid in zip(rows, grids, strict=True)]
    assert relative_error(packed, torch.cat(single)) < 2e-6
    assert ours.visual(torch.zeros(0, 1536), []).shape == (0, 192)


def test_compact_patches_equal_full_ones(pair, pixels, relative_error):
    ours, _ = pair
    compact = pixels([(1, 6, 10)], dim=768)
    full = compact.view(-1, 3, 1, 256).expand(-1, 3, 2, 256).reshape(-1, 1536)
    with torch.no_grad():
        assert relative_error(ours.visual(compact, [(1, 6, 10)]), ours.visual(full, [(1, 6, 10)])) < 3e-6


def test_wanted_rows_equal_the_full_pass(pair, pixels, prompt, relative_error):
    ours, _ = pair
    grids = IMAGES["two"][0]
    ids, pixel_values, rows = prompt(grids), pixels(grids, dim=1536), torch.tensor([0, 8, 70])
    with torch.no_grad():
        full = hidden_of(ours, ids, grids, pixel_values)
        assert relative_error(hidden_of(ours, ids, grids, pixel_values, rows), full[rows]) < 1e-6


def test_gradients_equal_transformers(pair, pixels, prompt):
    ours, theirs = pair
    grids = [(1, 6, 10), (1, 10, 18)]
    ids, pixel_values = prompt(grids), pixels(grids, dim=1536)
    logits = ours.logits(hidden_of(ours, ids, grids, pixel_values))
    loss = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    expected = theirs(**inputs_of(ids, grids, pixel_values), labels=torch.tensor([ids])).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    mine = hf_tensors(ours, of=lambda parameter: parameter.grad)
    for name, parameter in theirs.named_parameters():
        scale = max(parameter.grad.abs().max().item(), 1e-3)
        assert (mine.pop(checkpoint_name(name)) - parameter.grad).abs().max().item() < 5e-5 * scale, name
    assert not mine
    ours.zero_grad(set_to_none=True)
    theirs.zero_grad(set_to_none=True)


@pytest.mark.parametrize("tied", [True, False])
def test_to_transformers_and_back(tied, build, tmp_path, relative_error):
    transformers = pytest.importorskip("transformers")
    model = build(dataclasses.replace(CONFIG, tie_word_embeddings=tied), 8)
    save_model(model, tmp_path / "ours")
    theirs, report = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    ids = [1, 2, 3, 4, 5]
    with torch.no_grad():
        expected = theirs.eval()(input_ids=torch.tensor([ids])).logits[0]
        assert relative_error(model.logits(hidden_of(model, ids, [], None)), expected) < TOLERANCE
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    assert isinstance(back, Qwen3_VL)
    assert back.config == model.config
    assert all(torch.equal(tensor, hf_tensors(model)[name]) for name, tensor in hf_tensors(back).items())


def test_names_are_those_of_released_checkpoints(pair, tmp_path):
    save_model(pair[0], tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert {
        "model.visual.patch_embed.proj.bias",
        "model.visual.pos_embed.weight",
        "model.visual.blocks.0.mlp.linear_fc1.weight",
        "model.visual.deepstack_merger_list.1.norm.weight",
        "model.visual.merger.linear_fc2.bias",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.2.self_attn.q_norm.weight",
        "model.language_model.norm.weight",
    } <= set(written)
    assert all(name.startswith(("model.visual.", "model.language_model.")) for name in written)
    assert written["model.visual.patch_embed.proj.weight"].shape == (32, 3, 2, 16, 16)
    other = Qwen3_VL.build(CONFIG, 1)
    load_tensors(other, written)
    assert torch.equal(other.visual.pos_embed.weight, pair[0].visual.pos_embed.weight)


def test_layouts_of_transformers(pair):
    theirs = pair[1].config
    assert ModelConfig.from_json(CONFIG.to_json()) == CONFIG
    assert ModelConfig.from_json(json.loads(theirs.to_json_string(use_diff=False))) == CONFIG
    assert ModelConfig.from_json(json.loads(theirs.to_json_string(use_diff=True))) == CONFIG


def test_what_is_left_out_has_transformers_defaults():
    default = pytest.importorskip("transformers").Qwen3VLConfig()
    stated = {"vision_config": {"out_hidden_size": 4096}}
    ours, text = ModelConfig.from_json({"model_type": "qwen3_vl", **stated}), default.text_config
    theirs = ModelConfig.from_json(
        default.to_dict() | {"vision_config": default.vision_config.to_dict() | stated["vision_config"]}
    )
    assert ours == theirs
    assert (ours.text.rope_theta, ours.text.num_layers) == (text.rope_parameters["rope_theta"], text.num_hidden_layers)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (None, {"model_type": "qwen3_vl_moe"}, "'qwen3_vl_moe'.*mixtures of experts"),
        (None, {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("text_config", {"attention_bias": True}, "attention_bias = True"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn", "mrope_section": [4, 4, 4]}}, "rope_type = 'yarn'"),
        ("text_config", {"rope_scaling": {"mrope_interleaved": False}}, "mrope_interleaved = False"),
        ("text_config", {"rope_scaling": {"mrope_section": [4, 4, 3]}}, "half the head size"),
        ("text_config", {"head_dim": 23}, "head_dim = 23: must be even"),
        ("text_config", {"head_dim": "wide"}, "wrong type|head_dim"),
        ("text_config", {"num_hidden_layers": 2}, "2 blocks, must be fewer"),
        ("vision_config", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ("vision_config", {"num_position_embeddings": 24}, "must be a square"),
        ("vision_config", {"deepstack_visual_indexes": [0, 3]}, "not in 0..2"),
        ("vision_config", {"deepstack_visual_indexes": [2, 0]}, "must ascend"),
        ("vision_config", {"patch_size": [16, 16]}, "patch_size"),
    ],
)
def test_unusable_configs(part, change, message):
    written = CONFIG.to_json()
    changed = written | change if part is None else written | {part: written[part] | change}
    with pytest.raises(ModelLoadError, match=message):
        ModelConfig.from_json(changed)


def test_parts_of_two_families_do_not_mix():
    with pytest.raises(ModelLoadError, match="goes with a TextConfig"):
        ModelConfig(VisionConfig(out_hidden_size=64), qwen3_text())
