"""A run in small: a random model of two layers over bytes, a few pictures, a question each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers
from vtengine_training.trainer.config import GrpoConfig

from vtengine.config import build
from vtengine.model import ModelConfig, Qwen2_5_VL, TextConfig, VisionConfig, save_model

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)


def byte_encoder() -> tokenizers.Tokenizer:
    """256 bytes and the marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoder = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens(list(SPECIAL))
    encoder.add_tokens(["<tool_call>", "</tool_call>"])
    return encoder


def tiny_config(encoder: tokenizers.Tokenizer) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, fullatt_block_indexes=(0,)
        ),
        text=TextConfig(
            vocab_size=272,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            mrope_section=(1, 1, 2),
        ),
        image_token_id=encoder.token_to_id("<|image_pad|>"),
        video_token_id=encoder.token_to_id("<|video_pad|>"),
        vision_start_token_id=encoder.token_to_id("<|vision_start|>"),
        vision_end_token_id=encoder.token_to_id("<|vision_end|>"),
        bos_token_id=None,
        eos_token_id=encoder.token_to_id("<|im_end|>"),
        tie_word_embeddings=True,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder."""
    folder = tmp_path_factory.mktemp("tiny")
    encoder = byte_encoder()
    encoder.save(str(folder / "tokenizer.json"))
    model = Qwen2_5_VL.build(tiny_config(encoder), 3)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(0.5)  # flatter distributions: more to choose from
    save_model(model, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 12544}))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of five questions about three pictures."""
    folder = tmp_path_factory.mktemp("questions")
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 256, (56 + 28 * number, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [
        {"id": f"q{k}", "image": f"{k % 3}.png", "question": f"{k}?", "answer": str(k), "needs_high": bool(k % 2)}
        for k in range(5)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_config(tiny_folder: Path, tiny_data: Path, tmp_path: Path):
    """make_config(section={...}, key=value): a config of a run below tmp_path."""

    def make(**changes) -> GrpoConfig:
        data = {
            "model": str(tiny_folder),
            "output": str(tmp_path / "run"),
            "profile": "glance",
            "device": "cpu",
            "threads": 1,
            "steps": 3,
            "data": {"files": [str(tiny_data)]},
            "rollout": {"prompts": 2, "n": 4, "max_new_tokens": 6, "kv_mib": 16, "image_cache_mib": 16},
            "update": {"learning_rate": 1e-3, "max_tokens": 200},
            "checkpoint": {"every": 1, "keep": 2},
        }
        for key, value in changes.items():
            data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
        return build(GrpoConfig, data)

    return make
