"""What a Qwen2.5-VL checkpoint's `config.json` says of its two models. Standard library only.

Two layouts are read: the flat one of the released checkpoints, and the nested one (`text_config`, `vision_config`)
that transformers 5 writes. The flat one is written: transformers 4 and 5, SGLang and vLLM all load it.
"""

from __future__ import annotations

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

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"


@dataclass(frozen=True)
class VisionConfig(VisionSizes):
    """The vision tower. Sizes in pixels where not said otherwise; defaults are those of the 3B and 7B checkpoints."""

    model_type: ClassVar[str] = "qwen2_5_vl"

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    patch_size: int = 14
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    window_size: int = 112
    tokens_per_second: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_size % (self.patch_size * self.spatial_merge_size):
            raise ModelLoadError(
                f"vision_config.window_size = {self.window_size}: must be a multiple of patch_size * "
                f"spatial_merge_size (= {self.patch_size * self.spatial_merge_size})"
            )
        check_blocks("fullatt_block_indexes", self.fullatt_block_indexes, self.depth)

    @property
    def window_tokens(self) -> int:
        """Visual tokens (merged patches) per window side."""
        return self.window_size // self.patch_size // self.spatial_merge_size


@dataclass(frozen=True)
class TextConfig(TextSizes):
    """The language model; defaults are those of the 7B checkpoint."""

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4

    def _check_head_size(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise ModelLoadError(
                f"hidden_size = {self.hidden_size}: must be a multiple of 2 * num_attention_heads "
                f"(= {2 * self.num_heads})"
            )


def read(data: Mapping[str, Any]) -> tuple[VisionConfig, TextConfig]:
    """The contents of a `config.json`. Raises ModelLoadError, or what Python raises for a value of the wrong type.

    Keys that a file leaves out have the defaults of the transformers classes, as its writer left them out.
    """
    text, vision = data.get("text_config") or data, data.get("vision_config") or {}
    rope = rope_of(text)
    refuse_unsupported((
        ("use_sliding_window", bool(text.get("use_sliding_window")), (False,)),
        ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("vision_config.hidden_act", vision.get("hidden_act", "silu"), ("silu",)),
        ("rope_scaling.type", rope.get("rope_type", rope.get("type", "default")), ("default", "mrope")),
    ))  # fmt: skip
    num_heads = text.get("num_attention_heads", 64)
    return VisionConfig(
        depth=vision.get("depth", 32),
        hidden_size=vision.get("hidden_size", 3584),
        intermediate_size=vision.get("intermediate_size", 3420),
        num_heads=vision.get("num_heads", 16),
        out_hidden_size=vision.get("out_hidden_size", 3584),
        fullatt_block_indexes=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
        window_size=vision.get("window_size", 112),
        patch_size=vision.get("patch_size", 14),
        spatial_merge_size=vision.get("spatial_merge_size", 2),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
        tokens_per_second=vision.get("tokens_per_second", 4),
    ), TextConfig(
        vocab_size=text.get("vocab_size", 152064),
        hidden_size=text.get("hidden_size", 8192),
        intermediate_size=text.get("intermediate_size", 29568),
        num_layers=text.get("num_hidden_layers", 80),
        num_heads=num_heads,
        num_kv_heads=text.get("num_key_value_heads", 8) or num_heads,
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-5)),
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1_000_000.0))),
        mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
        max_position_embeddings=text.get("max_position_embeddings", 32768),
    )


def write(vision: VisionConfig, text: TextConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a `config.json` in the flat layout of the released checkpoints."""
    return {
        "architectures": [ARCHITECTURE],
        **common,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "max_window_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "num_key_value_heads": text.num_kv_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "use_cache": True,
        "vocab_size": text.vocab_size,
        "vision_config": {
            "depth": vision.depth,
            "hidden_act": "silu",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "in_channels": vision.in_channels,
            "in_chans": vision.in_channels,
            "out_hidden_size": vision.out_hidden_size,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "spatial_patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "tokens_per_second": vision.tokens_per_second,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.fullatt_block_indexes),
        },
    }
