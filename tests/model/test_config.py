"""config.json: both layouts, the released files, and clear errors for what cannot be loaded."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from vtengine.model import ModelConfig, ModelLoadError, TextConfig

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("VTENGINE_TEST_DATA", ROOT.parent / "shared" / "data"))


@pytest.mark.parametrize(
    ("size", "hidden", "heads", "tied"), [("3b", 2048, (16, 2), True), ("7b", 3584, (28, 4), False)]
)
def test_released_configs(size, hidden, heads, tied):
    path = DATA / "qwen2_5_vl_configs" / f"qwen2.5-vl-{size}.config.json"
    if not path.is_file():
        pytest.skip(f"no {path.name}: set VTENGINE_TEST_DATA to a folder with qwen2_5_vl_configs/")
    config = ModelConfig.from_json(path)
    assert config.text.hidden_size == config.vision.out_hidden_size == hidden
    assert (config.text.num_heads, config.text.num_kv_heads) == heads
    assert config.text.head_dim == 128
    assert config.tie_word_embeddings is tied
    assert config.vision.patch_dim == 1176
    assert config.vision.window_tokens == 4
    assert config.dtype == "bfloat16"
    assert ModelConfig.from_json(config.to_json()) == config


def test_nested_layout_of_transformers_5(small_config):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2_5_VLConfig(**small_config.to_json())
    for tied in (True, False):
        config = dataclasses.replace(small_config, tie_word_embeddings=tied)
        theirs.tie_word_embeddings = tied
        assert ModelConfig.from_json(json.loads(theirs.to_json_string(use_diff=False))) == config
        assert ModelConfig.from_json(json.loads(theirs.to_json_string(use_diff=True))) == config


def test_what_is_left_out_has_transformers_defaults():
    transformers = pytest.importorskip("transformers")
    default = transformers.Qwen2_5_VLConfig()
    written = default.text_config.to_dict()
    text = TextConfig(
        vocab_size=written["vocab_size"],
        hidden_size=written["hidden_size"],
        intermediate_size=written["intermediate_size"],
        num_layers=written["num_hidden_layers"],
        num_heads=written["num_attention_heads"],
        num_kv_heads=written["num_key_value_heads"],
        rms_norm_eps=written["rms_norm_eps"],
        max_position_embeddings=written["max_position_embeddings"],
    )
    ours = ModelConfig.from_json({"model_type": "qwen2_5_vl", "vision_config": {"out_hidden_size": 8192}})
    assert ours.text == text
    assert ours.vision.hidden_size == default.vision_config.hidden_size
    assert ours.vision.tokens_per_second == default.vision_config.tokens_per_second
    assert ours.tie_word_embeddings == default.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"model_type": None}, "only 'qwen2_5_vl'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [8, 12, 12]}}, "rope_scaling.type = 'yarn'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "add up to half the head size"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": 32}}, "wrong type"),
        ({"num_key_value_heads": 3}, "must divide num_attention_heads"),
        ({"num_attention_heads": 3}, "hidden_size = 128"),
        ({"hidden_size": 256, "num_attention_heads": 4}, "out_hidden_size = 128: must equal hidden_size"),
        ({"num_hidden_layers": 0}, "num_layers = 0"),
        ({"num_hidden_layers": "four"}, "num_layers = 'four'"),
        ({"num_hidden_layers": 1_000_000}, "num_layers = 1000000: must be at most 1024"),
        ({"hidden_size": 2**40}, f"hidden_size = {2**40}: must be at most"),
        ({"rms_norm_eps": "small"}, "wrong type"),
        ({"image_token_id": 320}, r"image_token_id = 320: must be a whole number in 0\.\.319 .*tokenizer\.json"),
        ({"image_token_id": "pad"}, "image_token_id = 'pad': must be a whole number"),
        ({"image_token_id": 310.0}, r"image_token_id = 310\.0: must be a whole number"),
        ({"video_token_id": None}, "video_token_id = None: must be"),
        ({"vision_start_token_id": -1}, "vision_start_token_id = -1: must be"),
        ({"vision_end_token_id": True}, "vision_end_token_id = True: must be"),
        ({"bos_token_id": 320}, "bos_token_id = 320: must be"),
        ({"eos_token_id": 151645}, "eos_token_id = 151645: must be"),
        ({"eos_token_id": []}, r"eos_token_id = \[\]: must hold at least one id"),
        ({"eos_token_id": [315, 1.5]}, r"eos_token_id = 1\.5: must be"),
        ({"vision_config": {"out_hidden_size": 128, "num_heads": 6}}, "multiple of 4 \\* num_heads"),
        ({"vision_config": {"out_hidden_size": 128, "hidden_size": 1280, "depth": 4}}, "not in 0..3"),
        ({"vision_config": {"out_hidden_size": 128, "hidden_size": 1280, "window_size": 100}}, "window_size = 100"),
        ({"vision_config": [1]}, "wrong type"),
        (
            {"vision_config": {"out_hidden_size": 128, "hidden_size": 64, "depth": 4, "fullatt_block_indexes": [0.5]}},
            r"fullatt_block_indexes: \[0\.5\] not in",
        ),
        (
            {"vision_config": {"out_hidden_size": 128, "spatial_merge_size": 2**19, "window_size": 14 * 2**19}},
            r"hidden_size \* spatial_merge_size\*\*2 = ",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [8.0, 12.0, 12.0]}}, "three whole numbers"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [-8, 20, 20]}}, "three whole numbers"),
        ({"rope_theta": 0}, "rope_theta = 0.0: must be positive"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: must be positive"),
    ],
)
def test_unusable_configs(small_config, change, message):
    with pytest.raises(ModelLoadError, match=message):
        ModelConfig.from_json(small_config.to_json() | change)


@pytest.mark.parametrize(("stated", "meant"), [(None, None), (315, 315), ([314, 315], 314)])
def test_what_ends_a_turn(small_config, stated, meant):
    assert ModelConfig.from_json(small_config.to_json() | {"eos_token_id": stated}).eos_token_id == meant


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_not_configs(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        ModelConfig.from_json(path)


def test_the_config_modules_need_the_standard_library_only():
    """They are read by tools that only want sizes."""
    modules = ("config", "qwen2_5_config", "qwen3_config", "sizes")
    allowed = {"vtengine.model", *(f"vtengine.model.{name}" for name in modules)}
    for name in modules:
        for node in ast.walk(ast.parse((ROOT / f"vtengine/model/{name}.py").read_text(encoding="utf-8"))):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in found:
                assert module in allowed or module.partition(".")[0] in sys.stdlib_module_names, (name, module)
