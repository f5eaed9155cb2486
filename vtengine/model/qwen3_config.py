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
    refuse_unsupported,
    rope_of,
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


def read(data: Mapping[str, Any]) -> tuple[Qwen3VisionConfig, Qwen3TextConfig]:
    """The contents of a `config.json`. Raises ModelLoadError, or what Python raises for a value of the wrong type.

    Keys that a file leaves out have the defaults of the transformers classes, as its writer left them out.
    """
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
    num_heads = text.get("num_attention_heads", 32)
    return Qwen3VisionConfig(
        depth=vision.get("depth", 27),
        hidden_size=vision.get("hidden_size", 1152),
        intermediate_size=vision.get("intermediate_size", 4304),
        num_heads=vision.get("num_heads", 16),
        out_hidden_size=vision.get("out_hidden_size", 3584),
        patch_size=vision.get("patch_size", 16),
        spatial_merge_size=vision.get("spatial_merge_size", 2),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        in_channels=vision.get("in_channels", 3),
        num_position_embeddings=vision.get("num_position_embeddings", 2304),
        deepstack_visual_indexes=tuple(vision.get("deepstack_visual_indexes", (8, 16, 24))),
    ), Qwen3TextConfig(
        vocab_size=text.get("vocab_size", 151936),
        hidden_size=text.get("hidden_size", 4096),
        intermediate_size=text.get("intermediate_size", 22016),
        num_layers=text.get("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=text.get("num_key_value_heads", 32) or num_heads,
        head_dim=text.get("head_dim", 128),
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 500_000.0))),
        mrope_section=tuple(rope.get("mrope_section", (24, 20, 20))),
        max_position_embeddings=text.get("max_position_embeddings", 128_000),
    )


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
            "attention_dropout": 0.0,
            "head_dim": text.head_dim,
            "hidden_act": "silu",
            "hidden_size": text.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
            "num_attention_heads": text.num_heads,
            "num_hidden_layers": text.num_layers,
            "num_key_value_heads": text.num_kv_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_interleaved": True,
                "mrope_section": list(text.mrope_section),
            },
            "use_cache": True,
            "vocab_size": text.vocab_size,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "deepstack_visual_indexes": list(vision.deepstack_visual_indexes),
            "depth": vision.depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vision.hidden_size,
            "in_channels": vision.in_channels,
            "initializer_range": 0.02,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "num_position_embeddings": vision.num_position_embeddings,
            "out_hidden_size": vision.out_hidden_size,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        },
    }
