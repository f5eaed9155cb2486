"""A random model of two layers over bytes."""

from __future__ import annotations

import tokenizers

from tests.tiny_model import config_of
from vtengine.model import ModelConfig, TextConfig, VisionConfig


def tiny_config(encoder: tokenizers.Tokenizer) -> ModelConfig:
    vision = VisionConfig(
        depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, fullatt_block_indexes=(0,)
    )
    text = TextConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mrope_section=(1, 1, 2),
    )
    return config_of(text, vision, encoder)
