"""What a Qwen3-VL checkpoint's `config.json` says of its two models. Standard library only.

The nested layout of the released checkpoints (`text_config`, `vision_config`) is read, as transformers 4 and 5 write
it, and written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vtengine.model.sizes import (
    ModelLoadError,
    TextSizes,
    VisionSizes,
    check_blocks,
    read_sizes,
    read_text,
    refuse_unsupported,
    rope_of,
    write_sizes,
    write_text,
)

ARCHITECTURE = "Qwen3VLForConditionalGeneration"


@dataclass(frozen=True)
class Qwen3VisionConfig(VisionSizes):
    """The vision tower; defaults are those of the 8B checkpoint.

    num_position_embeddings: learned positions, a square grid. deepstack_visual_indexes: the blocks whose features are
    added to what the language model's first layers give, in order, one layer each.
    """

    model_type: ClassVar[str] = "qwen3_vl"

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    out_hidden_size: int = 4096
    patch_size: int = 16
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_side**2 != self.num_position_embeddings:
            raise ModelLoadError(
                f"vision_config.num_position_embeddings = {self.num_position_embeddings}: must be a square number"
            )
        blocks = self.deepstack_visual_indexes
        check_blocks("deepstack_visual_indexes", blocks, self.depth)
        if list(blocks) != sorted(set(blocks)):
            raise ModelLoadError(f"vision_config.deepstack_visual_indexes = {list(blocks)}: must ascend")

    @property
    def position_side(self) -> int:
        """Learned positions per side of their grid."""
        return math.isqrt(self.num_position_embeddings)

    @property
    def feature_size(self) -> int:
        """The tower's own output, then that of each deepstack block."""
        return self.out_hidden_size * (1 + len(self.deepstack_visual_indexes))


@dataclass(frozen=True)
class Qwen3TextConfig(TextSizes):
    """The language model; defaults are those of the 8B checkpoint. The heads need not add up to the hidden size."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    rope_theta: float = 5_000_000.0
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    max_position_embeddings: int = 262_144
    head_dim: int = 128


VISION_LEFT_OUT = Qwen3VisionConfig(out_hidden_size=3584)
TEXT_LEFT_OUT = Qwen3TextConfig(
    intermediate_size=22016,
    num_layers=32,
    num_kv_heads=32,
    rope_theta=500_000.0,
    max_position_embeddings=128_000,
)
"""What a file means by a key that it leaves out: the defaults of the transformers classes, as its writer did."""


def read(data: Mapping[str, Any]) -> tuple[Qwen3VisionConfig, Qwen3TextConfig]:
    """The contents of a `config.json`. Raises ModelLoadError, or what Python raises for a value of the wrong type."""
    text, vision = data.get("text_config") or {}, data.get("vision_config") or {}
    rope = rope_of(text)
    gelu = "gelu_pytorch_tanh"
    refuse_unsupported((
        ("text_config.attention_bias", bool(text.get("attention_bias")), (False,)),
        ("text_config.hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("vision_config.hidden_act", vision.get("hidden_act", gelu), (gelu,)),
        ("rope_scaling.rope_type", rope.get("rope_type", rope.get("type", "default")), ("default", "mrope")),
        ("rope_scaling.mrope_interleaved", bool(rope.get("mrope_interleaved", True)), (True,)),
    ))  # fmt: skip
    return read_sizes(VISION_LEFT_OUT, vision), read_text(TEXT_LEFT_OUT, text)


def write(vision: Qwen3VisionConfig, text: Qwen3TextConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a `config.json` in the layout of the released checkpoints."""
    of_text = ("bos_token_id", "eos_token_id")
    return {
        "architectures": [ARCHITECTURE],
        **{name: value for name, value in common.items() if name not in of_text},
        "text_config": {
            "model_type": "qwen3_vl_text",
            **{name: common[name] for name in of_text},
            "attention_bias": False,
            **write_text(text, {"rope_type": "default", "mrope_interleaved": True}),
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "hidden_act": "gelu_pytorch_tanh",
            "initializer_range": 0.02,
            **write_sizes(vision),
        },
    }
