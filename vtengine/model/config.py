"""What a Qwen2.5-VL checkpoint is made of, read from and written to its `config.json`. Standard library only.

Two layouts are read: the flat one of the released checkpoints, and the nested one (`text_config`, `vision_config`)
that transformers 5 writes. The flat one is written: transformers 4 and 5, SGLang and vLLM all load it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL_TYPE = "qwen2_5_vl"
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
MAX_LAYERS = 1024
MAX_SIZE = 1 << 24  # of anything else: far beyond any model, and products of three still fit into 64 bits


class ModelLoadError(ValueError):
    """A checkpoint cannot be used as it is; the message says what is wrong with it and what to do."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Sizes in pixels where not said otherwise; defaults are those of the 3B and 7B checkpoints."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    window_size: int = 112
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3
    tokens_per_second: int = 2

    def __post_init__(self) -> None:
        _check_sizes("vision_config", self, exclude=("fullatt_block_indexes",))
        if self.hidden_size % (4 * self.num_heads):
            raise ModelLoadError(
                f"vision_config.hidden_size = {self.hidden_size}: must be a multiple of 4 * num_heads "
                f"(= {4 * self.num_heads})"
            )
        if self.window_size % (self.patch_size * self.spatial_merge_size):
            raise ModelLoadError(
                f"vision_config.window_size = {self.window_size}: must be a multiple of patch_size * "
                f"spatial_merge_size (= {self.patch_size * self.spatial_merge_size})"
            )
        outside = [i for i in self.fullatt_block_indexes if not 0 <= i < self.depth]
        if outside:
            raise ModelLoadError(f"vision_config.fullatt_block_indexes: {outside} not in 0..{self.depth - 1} (depth)")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches per visual token."""
        return self.spatial_merge_size**2

    @property
    def window_tokens(self) -> int:
        """Visual tokens (merged patches) per window side."""
        return self.window_size // self.patch_size // self.spatial_merge_size

    @property
    def compact_dim(self) -> int:
        """Values per patch when the temporal copies are left out (588)."""
        return self.in_channels * self.patch_size**2

    @property
    def patch_dim(self) -> int:
        """Values per patch (1176)."""
        return self.compact_dim * self.temporal_patch_size


@dataclass(frozen=True)
class TextConfig:
    """The language model; defaults are those of the 7B checkpoint."""

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    max_position_embeddings: int = 128_000

    def __post_init__(self) -> None:
        _check_sizes("text_config", self, exclude=("rms_norm_eps", "rope_theta", "mrope_section"))
        if self.hidden_size % (2 * self.num_heads):
            raise ModelLoadError(
                f"hidden_size = {self.hidden_size}: must be a multiple of 2 * num_attention_heads "
                f"(= {2 * self.num_heads})"
            )
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"num_key_value_heads = {self.num_kv_heads}: must divide num_attention_heads (= {self.num_heads})"
            )
        if len(self.mrope_section) != 3 or sum(self.mrope_section) != self.head_dim // 2:
            raise ModelLoadError(
                f"rope_scaling.mrope_section = {list(self.mrope_section)}: must be three numbers that add up to "
                f"half the head size (= {self.head_dim // 2})"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """Rows of a layer's keys, and of its values."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class ModelConfig:
    """The whole model. `eos_token_id` ends a turn where generation names no other stop id."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ModelLoadError(
                f"vision_config.out_hidden_size = {self.vision.out_hidden_size}: must equal hidden_size "
                f"(= {self.text.hidden_size})"
            )
        if not 0 <= self.image_token_id < self.text.vocab_size:
            raise ModelLoadError(f"image_token_id = {self.image_token_id}: must be in 0..{self.text.vocab_size - 1}")

    @staticmethod
    def from_json(source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Reads a `config.json` (its path, or its contents as a dict). Raises ModelLoadError."""
        data = dict(source) if isinstance(source, Mapping) else _read_json(Path(source))
        if data.get("model_type") != MODEL_TYPE:
            raise ModelLoadError(
                f"model_type = {data.get('model_type')!r}: only {MODEL_TYPE!r} (Qwen2.5-VL) checkpoints can be loaded"
            )
        text = data.get("text_config") or data
        vision = data.get("vision_config") or {}
        try:
            _refuse_unsupported(data, text, vision)
            return _build_config(data, text, vision)
        except ModelLoadError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelLoadError(
                f"config: a value has the wrong type ({error}); compare with a released config.json"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """The contents of a `config.json` in the flat layout of the released checkpoints."""
        text, vision = self.text, self.vision
        return {
            "architectures": [ARCHITECTURE],
            "model_type": MODEL_TYPE,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
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
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path}: no such file; a model folder needs its config.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelLoadError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path}: must hold a JSON object, holds a {type(data).__name__}")
    return data


def _check_sizes(where: str, config: VisionConfig | TextConfig, exclude: tuple[str, ...]) -> None:
    for name, value in vars(config).items():
        if name in exclude:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelLoadError(f"{where}.{name} = {value!r}: must be a whole number of at least 1")
        most = MAX_LAYERS if name in ("depth", "num_layers") else MAX_SIZE
        if value > most:
            raise ModelLoadError(f"{where}.{name} = {value}: must be at most {most}")


def _refuse_unsupported(data: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    """Settings that change what the weights mean and that this implementation does not have."""
    rope = _rope(text)
    for name, value, allowed in (
        ("quantization_config", data.get("quantization_config"), (None,)),
        ("use_sliding_window", bool(text.get("use_sliding_window")), (False,)),
        ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("vision_config.hidden_act", vision.get("hidden_act", "silu"), ("silu",)),
        ("rope_scaling.type", rope.get("rope_type", rope.get("type", "default")), ("default", "mrope")),
    ):
        if value not in allowed:
            shown = ", ".join(repr(a) for a in allowed)
            raise ModelLoadError(f"{name} = {value!r}: not supported (allowed: {shown}); use an unmodified checkpoint")


def _rope(text: Mapping[str, Any]) -> Mapping[str, Any]:
    return text.get("rope_scaling") or text.get("rope_parameters") or {}


def _build_config(data: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any]) -> ModelConfig:
    """Keys that a file leaves out have the defaults of the transformers classes, as its writer left them out."""
    rope = _rope(text)
    num_heads = text.get("num_attention_heads", 64)
    eos = text.get("eos_token_id", data.get("eos_token_id", 151645))
    return ModelConfig(
        vision=VisionConfig(
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
        ),
        text=TextConfig(
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
        ),
        tie_word_embeddings=bool(data.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)),
        image_token_id=data.get("image_token_id", 151655),
        video_token_id=data.get("video_token_id", 151656),
        vision_start_token_id=data.get("vision_start_token_id", 151652),
        vision_end_token_id=data.get("vision_end_token_id", 151653),
        bos_token_id=text.get("bos_token_id", data.get("bos_token_id", 151643)),
        eos_token_id=eos[0] if isinstance(eos, (list, tuple)) else eos,
        dtype=str(data.get("torch_dtype") or data.get("dtype") or text.get("dtype") or "float32").removeprefix(
            "torch."
        ),
    )
