"""What we believe about the model that SGLang serves: ids, vocabulary, pixel limits of its image processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from vtengine.engine.sglang.checks import MODEL_TYPE
from vtengine.model import ModelConfig
from vtengine.vision.plan import PixelLimits
from vtengine.vision.processor import image_processor

DEFAULT = PixelLimits()


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
    min_pixels: int = DEFAULT.min_pixels
    max_pixels: int = DEFAULT.max_pixels
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
        limits = image_processor(folder).limits
        ids = (config.text.vocab_size, config.image_token_id, config.video_token_id)
        pixels = (limits.min_pixels, limits.max_pixels)
        decode = _decoder(folder / "tokenizer.json")
        return ServedModel(str(folder), *ids, *pixels, config.vision.patch_dim, config, decode)

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
