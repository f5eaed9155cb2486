"""What a run leaves behind: a checkpoint folder that vtengine, transformers and SGLang read as it was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from vtengine.model import VLModel, meta_model, save_model
from vtengine.protocol.profile import PROFILE_FILE
from vtengine.vision.processor import PROCESSOR_FILES, image_processor, read_json
from vtengine_training.lora.adapters import save_adapter
from vtengine_training.trainer.parts import Parts
from vtengine_training.trainer.ranks import Ranks

COPIED = ("*.json", "*.txt", "*.jinja", "*.toml")
NOT_COPIED = ("config.json", "model.safetensors.index.json")


def export_model(model: VLModel, parts: Parts, folder: Path) -> None:
    """A checkpoint folder as `parts` was trained from: weights in the dtype they came in, tokenizer and processor
    copied; with the profile and the largest view that it was trained with, where these are not its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in COPIED:
        for path in parts.folder.glob(pattern):
            if path.name not in NOT_COPIED:
                shutil.copyfile(path, folder / path.name)
    if parts.profile:
        (folder / PROFILE_FILE).write_bytes(parts.profile)
    if (max_pixels := parts.pipeline.limits.max_pixels) != image_processor(parts.folder).limits.max_pixels:
        _state_max_pixels(folder, max_pixels)
    dtype = getattr(torch, model.config.dtype, model.dtype)
    if dtype != model.dtype:
        shipped = meta_model(model.config)
        shipped.to(dtype).to_empty(device="cpu").load_state_dict(model.state_dict())
        model = shipped
    save_model(model, folder)


def _state_max_pixels(folder: Path, max_pixels: int) -> None:
    """In every file that describes an image processor, for whichever of them a reader prefers."""
    configs = {name: read_json(folder / name) for name in PROCESSOR_FILES if (folder / name).is_file()}
    first = PROCESSOR_FILES[0]
    for name in [name for name in configs if name == first or "image_processor" in configs[name]] or [first]:
        config = configs.get(name, {})
        stated = config.get("image_processor", config)
        stated["max_pixels"] = max_pixels
        if isinstance(size := stated.get("size"), dict):
            size["longest_edge"] = max_pixels
        (folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def export_whole(parts: Parts, output: Path, ranks: Ranks) -> None:
    """What a run ends with: output/model, and with adapters, which are in its weights, output/adapter. A meeting."""
    adapters = parts.adapters
    tensors = None if adapters is None else adapters.tensors()
    model = parts.models.whole(ranks, parts.folder)

    def write() -> None:
        if adapters is not None and tensors is not None:
            save_adapter(tensors, adapters, parts.folder, output / "adapter")
        assert model is not None
        export_model(model, parts, output / "model")

    ranks.from_first(write)  # the others wait for it: processes end their groups together
