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
    read_sizes,
    read_text,
    refuse_unsupported,
    rope_of,
    write_sizes,
    write_text,
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


VISION_LEFT_OUT = VisionConfig(hidden_size=3584, tokens_per_second=4)
TEXT_LEFT_OUT = TextConfig(
    hidden_size=8192,
    intermediate_size=29568,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=32768,
)
"""What a file means by a key that it leaves out: the defaults of the transformers classes, as its writer did."""


def read(data: Mapping[str, Any]) -> tuple[VisionConfig, TextConfig]:
    """The contents of a `config.json`. Raises ModelLoadError, or what Python raises for a value of the wrong type."""
    text, vision = data.get("text_config") or data, data.get("vision_config") or {}
    rope = rope_of(text)
    refuse_unsupported((
        ("use_sliding_window", bool(text.get("use_sliding_window")), (False,)),
        ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("vision_config.hidden_act", vision.get("hidden_act", "silu"), ("silu",)),
        ("rope_scaling.type", rope.get("rope_type", rope.get("type", "default")), ("default", "mrope")),
    ))  # fmt: skip
    if "in_chans" in vision:
        vision = {"in_channels": vision["in_chans"], **vision}
    return read_sizes(VISION_LEFT_OUT, vision), read_text(TEXT_LEFT_OUT, text)


def write(vision: VisionConfig, text: TextConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a `config.json` in the flat layout of the released checkpoints."""
    return {
        "architectures": [ARCHITECTURE],
        **common,
        **write_text(text, {"type": "mrope"}),
        "max_window_layers": text.num_layers,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "vision_config": {
            "hidden_act": "silu",
            "in_chans": vision.in_channels,
            "spatial_patch_size": vision.patch_size,
            **write_sizes(vision),
        },
    }
