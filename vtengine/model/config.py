"""What a checkpoint is made of, read from and written to its `config.json`. Standard library only.

What a family's file says of its vision tower and its language model is for `qwen2_5_config` and `qwen3_config`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vtengine.model import qwen2_5_config, qwen3_config
from vtengine.model.qwen2_5_config import TextConfig, VisionConfig
from vtengine.model.qwen3_config import Qwen3TextConfig
from vtengine.model.sizes import ModelLoadError as ModelLoadError
from vtengine.model.sizes import TextSizes, VisionSizes, refuse_unsupported


class _Family(NamedTuple):
    name: str
    text: type[TextSizes]
    read: Callable[[Mapping[str, Any]], tuple[VisionSizes, TextSizes]]
    write: Callable[[Any, Any, Mapping[str, Any]], dict[str, Any]]


_FAMILIES = {
    "qwen2_5_vl": _Family("Qwen2.5-VL", TextConfig, qwen2_5_config.read, qwen2_5_config.write),
    "qwen3_vl": _Family("Qwen3-VL", Qwen3TextConfig, qwen3_config.read, qwen3_config.write),
}
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
OPTIONAL_TOKEN_IDS = ("bos_token_id", "eos_token_id")
"""A model may do without them."""


@dataclass(frozen=True)
class ModelConfig:
    """The whole model, of the family that its two parts belong to. The default is Qwen2.5-VL-7B.

    `eos_token_id` ends a turn where generation names no other stop id.
    """

    vision: VisionSizes = field(default_factory=VisionConfig)
    text: TextSizes = field(default_factory=TextConfig)
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        family = _FAMILIES[self.model_type]
        if not isinstance(self.text, family.text):
            raise ModelLoadError(
                f"text = {type(self.text).__name__}: a tower of {family.name} goes with a {family.text.__name__}"
            )
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ModelLoadError(
                f"vision_config.out_hidden_size = {self.vision.out_hidden_size}: must equal hidden_size "
                f"(= {self.text.hidden_size})"
            )
        added = self.vision.feature_size // self.vision.out_hidden_size - 1
        if added >= self.text.num_layers:
            raise ModelLoadError(
                f"vision_config.deepstack_visual_indexes: {added} blocks, must be fewer than the language model's "
                f"layers (= {self.text.num_layers})"
            )
        for name in TOKEN_IDS:
            _check_token(name, getattr(self, name), self.text.vocab_size)
        for name in OPTIONAL_TOKEN_IDS:
            if (token := getattr(self, name)) is not None:
                _check_token(name, token, self.text.vocab_size)

    @property
    def model_type(self) -> str:
        return self.vision.model_type

    @staticmethod
    def from_json(source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Reads a `config.json` (its path, or its contents as a dict). Raises ModelLoadError."""
        data = dict(source) if isinstance(source, Mapping) else _read_json(Path(source))
        family = _family_of(data.get("model_type"))
        try:
            refuse_unsupported((("quantization_config", data.get("quantization_config"), (None,)),))
            return _build_config(data, family)
        except ModelLoadError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelLoadError(
                f"config: a value has the wrong type ({error}); compare with a released config.json"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """The contents of a `config.json`, in the layout of the family's released checkpoints."""
        common = {
            "model_type": self.model_type,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
        }
        return _FAMILIES[self.model_type].write(self.vision, self.text, common)


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


def _family_of(model_type: object) -> _Family:
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = " and ".join(f"{name!r} ({family.name})" for name, family in _FAMILIES.items())
        mixture = isinstance(model_type, str) and model_type.endswith("_moe")
        hint = "; mixtures of experts are not supported, take a dense model" if mixture else ""
        raise ModelLoadError(f"model_type = {model_type!r}: only {known} checkpoints can be loaded{hint}")
    return family


def _check_token(name: str, token: object, vocab_size: int) -> None:
    if type(token) is not int or not 0 <= token < vocab_size:
        raise ModelLoadError(
            f"{name} = {token!r}: must be a whole number in 0..{vocab_size - 1} (vocab_size); state in config.json the "
            "id that this token has in tokenizer.json"
        )


def _first_of(name: str, tokens: list[object], vocab_size: int) -> Any:
    if not tokens:
        raise ModelLoadError(f"{name} = []: must hold at least one id; state that of <|im_end|> in tokenizer.json")
    for token in tokens:
        _check_token(name, token, vocab_size)
    return tokens[0]


def _build_config(data: Mapping[str, Any], family: _Family) -> ModelConfig:
    """Keys that a file leaves out have the defaults of the transformers classes, as its writer left them out."""
    vision, text = family.read(data)
    stated = data.get("text_config") or data
    eos = stated.get("eos_token_id", data.get("eos_token_id", 151645))
    return ModelConfig(
        vision,
        text,
        tie_word_embeddings=bool(data.get("tie_word_embeddings", False) or stated.get("tie_word_embeddings", False)),
        image_token_id=data.get("image_token_id", 151655),
        video_token_id=data.get("video_token_id", 151656),
        vision_start_token_id=data.get("vision_start_token_id", 151652),
        vision_end_token_id=data.get("vision_end_token_id", 151653),
        bos_token_id=stated.get("bos_token_id", data.get("bos_token_id", 151643)),
        eos_token_id=_first_of("eos_token_id", eos, text.vocab_size) if isinstance(eos, list) else eos,
        dtype=str(data.get("torch_dtype") or data.get("dtype") or stated.get("dtype") or "float32").removeprefix(
            "torch."
        ),
    )
