"""What we believe about the model that SGLang serves: ids, vocabulary, pixel limits of its image processor."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vtengine.engine.sglang.checks import MODEL_TYPE
from vtengine.model import ModelConfig

DEFAULT_MIN_PIXELS = 56 * 56
DEFAULT_MAX_PIXELS = 28 * 28 * 16384


@dataclass(frozen=True)
class ServedModel:
    """name: how it is called in messages (its folder). Pixel limits are those of the checkpoint's image processor.

    An image outside of them would be resized by SGLang; that matters only where images travel as PNG, and so does
    `decode` (ids to text with special tokens), without which a text that spells a marker is not noticed.
    """

    name: str
    vocab_size: int
    image_token_id: int
    video_token_id: int
    min_pixels: int = DEFAULT_MIN_PIXELS
    max_pixels: int = DEFAULT_MAX_PIXELS
    patch_dim: int = 1176
    config: ModelConfig | None = None
    decode: Callable[[Sequence[int]], str] | None = None

    @staticmethod
    def from_folder(folder: str | Path) -> ServedModel:
        """Reads config.json and, where they are there, the files of the image processor. Raises ValueError."""
        folder = Path(folder)
        config = ModelConfig.from_json(folder / "config.json")
        if config.model_type != MODEL_TYPE:
            raise ValueError(f"model {folder}: is a {config.model_type}; SGLang serves Qwen2.5-VL here: use embedded")
        low, high = _pixel_limits(folder)
        ids = (config.text.vocab_size, config.image_token_id, config.video_token_id)
        decode = _decoder(folder / "tokenizer.json")
        return ServedModel(str(folder), *ids, low, high, config.vision.patch_dim, config, decode)

    @property
    def compact_dim(self) -> int:
        """Values per patch without the temporal copy."""
        return self.patch_dim // 2


def _decoder(path: Path) -> Callable[[Sequence[int]], str] | None:
    if not path.is_file():
        return None
    try:
        encoder = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path}: cannot be read as a tokenizer: {error}") from None
    return lambda token_ids: encoder.decode(list(token_ids), skip_special_tokens=False)


def _pixel_limits(folder: Path) -> tuple[int, int]:
    data: dict[str, Any] = {}
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):  # the later one wins
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
        data |= found.get("image_processor") or found
    size = data.get("size") or {}
    low = data.get("min_pixels") or size.get("shortest_edge") or DEFAULT_MIN_PIXELS
    high = data.get("max_pixels") or size.get("longest_edge") or DEFAULT_MAX_PIXELS
    return int(low), int(high)
