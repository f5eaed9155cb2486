"""A checkpoint folder that is only read: what is in it, held against its config, then tensors whole or in part."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vtengine.model.config import ModelConfig, ModelLoadError
from vtengine.model.families import meta_model
from vtengine.model.names import checkpoint_name, hf_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
NAMES_SHOWN = 8
TENSORS_PER_READER = 32


@dataclass(frozen=True)
class Checkpoint:
    """config.json and *.safetensors of a folder. places: checkpoint name -> (file, the tensor's name there)."""

    config: ModelConfig
    places: Mapping[str, tuple[Path, str]]

    @staticmethod
    def open(path: str | Path) -> Checkpoint:
        """Reads config and headers. Raises ModelLoadError for what does not fit, before anything takes memory."""
        folder = Path(path)
        if not folder.is_dir():
            raise ModelLoadError(
                f"{folder}: not a folder; give the folder of a checkpoint (config.json and *.safetensors)"
            )
        config = ModelConfig.from_json(folder / "config.json")
        places: dict[str, tuple[Path, str]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in _weight_files(folder):
            with _reading(file) as reader:
                for name in reader.keys():  # noqa: SIM118
                    places[checkpoint_name(name)] = (file, name)
                    shapes[name] = tuple(reader.get_slice(name).get_shape())
        model = meta_model(config)
        check_shapes(hf_tensors(model), shapes, False, str(folder))
        return Checkpoint(config, places)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of all, one after the other. Raises ModelLoadError on coming to NaN or infinity.

        A reader serves only a few: what it has read of a file stays mapped, and counts as memory, as long as it lives.
        """
        for file in dict.fromkeys(file for file, _ in self.places.values()):
            names = [name for place, name in self.places.values() if place == file]
            for first in range(0, len(names), TENSORS_PER_READER):
                with _reading(file) as reader:
                    for name in names[first : first + TENSORS_PER_READER]:
                        tensor = reader.get_tensor(name)
                        _check_finite(file, name, tensor)
                        yield name, tensor

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Some rows of a tensor; the others are not read. Raises ModelLoadError for NaN or infinity in them."""
        file, own = self.places[name]
        with _reading(file) as reader:
            tensor: Tensor = reader.get_slice(own)[begin:end]
        check_kind(name, tensor)
        _check_finite(file, name, tensor)
        return tensor


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file}: damaged or not safetensors ({error}); download it again") from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ModelLoadError(f"{index}: not a safetensors index ({error!r}); download it again") from error
        if bad := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise ModelLoadError(f"{index}: names files outside the folder: {some(map(str, bad))}")
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise ModelLoadError(f"{folder}: shards named by {INDEX} are missing: {some(absent)}; download them again")
        return [folder / name for name in names]
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        hint = "pickled weights are not read; save them as safetensors" if pickled else "download the weights"
        raise ModelLoadError(f"{folder}: no {WEIGHTS}; {hint}")
    return files


def check_shapes(
    targets: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], partial: bool, where: str
) -> None:
    """Raises ModelLoadError listing what does not fit. An `lm_head.weight` of a tied model is for others to see to."""
    given = {checkpoint_name(name): shape for name, shape in shapes.items()}
    missing = [name for name in targets if name not in given]
    extra = [name for name in given if name not in targets and name != HEAD]
    misshapen = [
        f"{name} is {list(shape)}, config says {list(targets[name].shape)}"
        for name, shape in given.items()
        if name in targets and tuple(targets[name].shape) != shape
    ]
    faults = []
    if missing and not partial:
        faults.append(f"{len(missing)} missing: {some(missing)}")
    if extra:
        faults.append(f"{len(extra)} unexpected: {some(extra)}")
    if misshapen:
        faults.append(f"{len(misshapen)} misshapen: {some(misshapen)}")
    if faults:
        raise ModelLoadError(
            f"{where}: tensors do not fit the config: {'; '.join(faults)}. Use the config.json that belongs "
            "to these weights, or download both again"
        )


def check_kind(name: str, tensor: Tensor) -> None:
    """Raises ModelLoadError for what is not floating-point, or of 8 bits, which need scales."""
    if not _is_plain(tensor):
        raise ModelLoadError(f"{name} is {tensor.dtype}: quantised checkpoints are not read")


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1


def _check_finite(file: Path, name: str, tensor: Tensor) -> None:
    """One pass without a copy: smallest and largest value are NaN where any is, and infinite where one is."""
    if not _is_plain(tensor) or not tensor.numel():
        return  # `load_tensors` refuses what is not plain
    if not all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(tensor)).tolist()):
        broken = int((~tensor.isfinite()).sum())
        raise ModelLoadError(
            f"{file}: {name} has {broken} of {tensor.numel()} values that are NaN or infinite; download the file "
            "again, or take the checkpoint before it (a training that diverged writes such weights)"
        )


def some(names: Iterable[str]) -> str:
    """The first few, and how many there are besides."""
    listed = list(names)
    more = f" and {len(listed) - NAMES_SHOWN} more" if len(listed) > NAMES_SHOWN else ""
    return ", ".join(listed[:NAMES_SHOWN]) + more
