"""A random model of two layers over bytes, and its tokenizer."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from vtengine.model import ModelConfig, TextConfig, VisionConfig

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
