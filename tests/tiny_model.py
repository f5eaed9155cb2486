"""What the random models of the tests have in common: which ids are special, and bytes as a tokenizer."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from vtengine.model import ModelConfig, Qwen3TextConfig, Qwen3VisionConfig, TextConfig, VisionConfig
from vtengine.model.sizes import TextSizes, VisionSizes

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
TAGS = ("<tool_call>", "</tool_call>")
PAD, VIDEO, START, END, BOS, STOP = range(310, 316)
"""Special ids of a vocabulary of 320 that has no tokenizer."""
TINY_VISION = VisionConfig(
    depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, fullatt_block_indexes=(1,)
)


def tiny_text(vocab_size: int = 320) -> TextConfig:
    """Goes with TINY_VISION."""
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mrope_section=(2, 3, 3),
    )


QWEN3_VISION = Qwen3VisionConfig(
    depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, num_position_embeddings=25,
    deepstack_visual_indexes=(0, 2),
)  # fmt: skip


def qwen3_text(vocab_size: int = 320) -> Qwen3TextConfig:
    """Goes with QWEN3_VISION. The heads are wider than the hidden size."""
    return Qwen3TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        mrope_section=(4, 4, 4),
    )


def byte_encoder(merges: tuple[tuple[str, str], ...] = (), tags: tuple[str, ...] = TAGS) -> tokenizers.Tokenizer:
    """256 bytes, the merges, the marks, and the tags that are one token."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    encoder = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens(list(SPECIAL))
    encoder.add_tokens(list(tags))
    return encoder


def config_of(text: TextSizes, vision: VisionSizes, encoder: tokenizers.Tokenizer | None = None) -> ModelConfig:
    """A tied float32 model of these sizes, with the ids of the encoder; without one, PAD, VIDEO, START and so on."""
    pad, video, start, end, bos, stop = PAD, VIDEO, START, END, BOS, STOP
    if encoder is not None:
        marks = ("image_pad", "video_pad", "vision_start", "vision_end")
        pad, video, start, end = (encoder.token_to_id(f"<|{name}|>") for name in marks)
        bos, stop = None, encoder.token_to_id("<|im_end|>")
    return ModelConfig(
        vision,
        text,
        tie_word_embeddings=True,
        image_token_id=pad,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        bos_token_id=bos,
        eos_token_id=stop,
        dtype="float32",
    )
