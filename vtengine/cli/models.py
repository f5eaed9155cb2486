"""Which folder `--model` means: the shipped model, a folder, or a Hugging Face id; and what its files state."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vtengine.cli.errors import UsageError, one_line
from vtengine.vision import processor

SHIPPED_NAMES = ("glance", "glance-sft", "glance-crop")
"""The model taught when to look again, the cold start that it came from, and one that looks again at a part."""
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
        return processor.read_json(path)
    except ValueError as error:
        raise UsageError(f"--model: {one_line(error)}") from None


def context_tokens(folder: Path) -> int | None:
    """The longest context that the checkpoint's config.json states."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    stated = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return stated if isinstance(stated, int) and stated > 0 else None


def bfloat16_bytes(folder: Path) -> int:
    """Of the weights of a checkpoint that says it is in bfloat16; 0: it is in another dtype, or does not say."""
    config = read_json(folder / "config.json")
    if "bfloat16" not in (config.get("torch_dtype"), config.get("dtype")):
        return 0
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


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
