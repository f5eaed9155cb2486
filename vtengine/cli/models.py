"""Which folder `--model` means: the shipped model, a folder, or a Hugging Face id; and what its files state."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vtengine.cli.errors import UsageError, one_line
from vtengine.vision.plan import MERGE, QWEN3_LIMITS, PixelLimits

SHIPPED_NAMES = ("glance", "glance-sft", "glance-crop")
"""The model taught when to look again, the cold start that it came from, and one that looks again at a part."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""What may describe an image processor; the second one, where it does, counts for transformers 5."""
_HF_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.json", "*.safetensors", "*.toml", "*.txt", "*.jinja")


def shipped_model(name: str = SHIPPED_NAMES[0]) -> Path:
    """Folder of a model that comes with the package (it may be absent in a source tree without it)."""
    return Path(__file__).resolve().parents[1] / "assets" / name


def find_model(name: str) -> Path:
    """The folder of a checkpoint; a Hugging Face id is downloaded into its cache. Raises UsageError with the remedy."""
    folder = Path(name)
    if name in SHIPPED_NAMES and not folder.is_dir():
        folder = shipped_model(name)
        if not folder.is_dir():
            raise UsageError(f"--model {name}: the shipped model is not in this installation ({folder})")
    elif not folder.exists():
        if not is_hub_id(name):
            raise UsageError(f"--model {name}: no such folder, and no Hugging Face id (owner/name) either")
        folder = _download(name)
    if not folder.is_dir():
        raise UsageError(f"--model {name}: is a file; give the folder of a checkpoint")
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model {name}: {folder} holds no config.json, so it is no checkpoint")
    read_json(folder / "config.json")
    return folder


def is_hub_id(name: str) -> bool:
    """Whether it names a repository of the Hugging Face hub (owner/name), and no folder of this machine."""
    return bool(_HF_ID.fullmatch(name)) and not Path(name).exists()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file of a checkpoint. Raises UsageError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--model: {path} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise UsageError(f"--model: {path} holds no JSON object")
    return config


class ImageProcessor(NamedTuple):
    """How a checkpoint wants its images. mean, std: of the three channels."""

    limits: PixelLimits
    mean: tuple[float, ...]
    std: tuple[float, ...]


def image_processor(folder: Path) -> ImageProcessor:
    """What the checkpoint's image processor states, as released or as transformers 5 writes it; for what it leaves out
    the values that its family was released with. Raises UsageError for pixels that we would not make."""
    config: dict[str, Any] = {}
    for name in PROCESSOR_FILES:
        found = read_json(folder / name) if (folder / name).is_file() else {}
        config |= _part(found, "image_processor") or found
    family = _family(folder)
    _check_processor(folder, config, family)
    size = _part(config, "size")
    stated = {"min_pixels": config.get("min_pixels") or size.get("shortest_edge")}
    stated["max_pixels"] = config.get("max_pixels") or size.get("longest_edge")
    for name, value in stated.items():
        if value is not None and type(value) is not int:
            raise _unfit(folder, name, value, "must be a whole number of pixels")
    limits = replace(family.limits, **{key: value for key, value in stated.items() if value is not None})
    return family._replace(limits=limits)


def _family(folder: Path) -> ImageProcessor:
    from vtengine_kernels.patchify import CLIP_MEAN, CLIP_STD, HALF

    if read_json(folder / "config.json").get("model_type") == "qwen3_vl":
        return ImageProcessor(QWEN3_LIMITS, HALF, HALF)
    return ImageProcessor(PixelLimits(), CLIP_MEAN, CLIP_STD)


def _check_processor(folder: Path, config: dict[str, Any], family: ImageProcessor) -> None:
    """Raises UsageError for pixel values that we would not make: their model would be shown others without a word."""
    for name, ours in (("patch_size", family.limits.patch), ("temporal_patch_size", 2), ("merge_size", MERGE)):
        if config.get(name, ours) != ours:
            raise _unfit(folder, name, config[name], f"only {ours} is supported for this model")
    for name, mean_or_std in (("image_mean", family.mean), ("image_std", family.std)):
        stated = config.get(name, mean_or_std)
        try:
            fits = all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(stated, mean_or_std, strict=True))
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise _unfit(folder, name, stated, f"only {list(mean_or_std)} is supported for this model")


def _unfit(folder: Path, name: str, value: object, remedy: str) -> UsageError:
    return UsageError(f"--model: {folder}: its image processor's file says {name} = {value!r}: {remedy}")


def context_tokens(folder: Path) -> int | None:
    """The longest context that the checkpoint's config.json states."""
    config = read_json(folder / "config.json")
    stated = (_part(config, "text_config") or config).get("max_position_embeddings")
    return stated if isinstance(stated, int) and stated > 0 else None


def bfloat16_bytes(folder: Path) -> int:
    """Of the weights of a checkpoint that says it is in bfloat16; 0: it is in another dtype, or does not say."""
    config = read_json(folder / "config.json")
    if "bfloat16" not in (config.get("torch_dtype"), config.get("dtype")):
        return 0
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _part(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def cached_config(name: str) -> Path | None:
    """The config.json of a Hugging Face id, where it was fetched before; nothing is fetched."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        fix = "pip install 'vtengine[hf]', or give the path of a downloaded folder"
        raise UsageError(f"--model {name}: no such folder; to fetch it from Hugging Face: {fix}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub client raises many kinds: offline, no such repository, no access
        raise UsageError(f"--model {name}: no such folder, and fetching it failed: {one_line(error)[:200]}") from None
