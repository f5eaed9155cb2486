"""Checkpoints: Hugging Face safetensors in and out. Nothing is unpickled, nothing is left half written."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vtengine.model.config import ModelConfig, ModelLoadError
from vtengine.model.names import checkpoint_name, hf_tensors
from vtengine.model.qwen2_5_vl import Qwen2_5_VL

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
NAMES_SHOWN = 8

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_tensors(
    model: Qwen2_5_VL, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], partial: bool = False
) -> None:
    """Copies checkpoint tensors into the model in place, casting to its dtype and device.

    tensors: by checkpoint or transformers 5 name. A mapping is checked first: missing, unexpected and misshapen tensors
    are a ModelLoadError that lists them, a quantised one is another, and neither changes anything. An iterable of
    (name, tensor) is consumed one at a time: what came before a fault stays. partial: tensors may be missing (a weight
    update in buckets).
    A tied model takes no `lm_head.weight`; one that equals the embedding is accepted.
    """
    targets = hf_tensors(model)
    head = None
    if isinstance(tensors, Mapping):
        tensors = _fitting(targets, tensors, partial).items()
    seen = set()
    with torch.no_grad():
        for name, tensor in tensors:
            known = checkpoint_name(name)
            if known == _HEAD and _HEAD not in targets:
                head = tensor
                continue
            target = targets.get(known)
            if target is None or target.shape != tensor.shape:
                expected = "no tensor of this name" if target is None else list(target.shape)
                raise ModelLoadError(f"weight update: {name} is {list(tensor.shape)}, the config says {expected}")
            _check_kind(name, tensor)
            target.copy_(tensor)
            seen.add(known)
    if not partial and (missing := [name for name in targets if name not in seen]):
        raise ModelLoadError(f"weight update: {len(missing)} tensors missing: {_some(missing)}")
    if head is not None and _EMBED in seen:
        _check_tied(head, targets[_EMBED])


def _fitting(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], partial: bool) -> dict[str, Tensor]:
    """`tensors` by checkpoint name, a tied model's head left out. Raises ModelLoadError for whatever does not fit."""
    _check(targets, {name: tuple(x.shape) for name, x in tensors.items()}, partial, "weight update")
    for name, tensor in tensors.items():
        _check_kind(name, tensor)
    given = {checkpoint_name(name): tensor for name, tensor in tensors.items()}
    if _HEAD not in targets and (head := given.pop(_HEAD, None)) is not None and _EMBED in given:
        _check_tied(head, given[_EMBED])
    return given


def _check_kind(name: str, tensor: Tensor) -> None:
    if not _is_plain(tensor):
        raise ModelLoadError(f"{name} is {tensor.dtype}: quantised checkpoints are not read")


def _is_plain(tensor: Tensor) -> bool:
    """Floating-point, and not of 8 bits, which need scales."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def _check_tied(head: Tensor, embed: Tensor) -> None:
    if not torch.equal(head.to(embed), embed):
        raise ModelLoadError(
            f"{_HEAD} differs from {_EMBED}, but the config says tie_word_embeddings: true; set it to false in "
            f"config.json, or delete {_HEAD}"
        )


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Qwen2_5_VL:
    """Loads a checkpoint folder (config.json and *.safetensors).

    Raises ModelLoadError: for what does not fit, before it takes memory; for NaN or infinity, on coming to it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelLoadError(f"{folder}: not a folder; give the folder of a checkpoint (config.json and *.safetensors)")
    config = ModelConfig.from_json(folder / "config.json")
    files = _weight_files(folder)
    with torch.device("meta"):
        model = Qwen2_5_VL(config)
    _check(hf_tensors(model), _shapes(files), False, str(folder))
    model.to(dtype).to_empty(device=device)
    load_tensors(model, _read(files))
    return model.eval()


def save_model(model: Qwen2_5_VL, path: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config.json and the weights (one file, or shards of at most shard_bytes with an index) under HF names.

    Every file is written beside its place and then renamed; weight files of an earlier save are removed at the end.
    One file is replaced whole; a reader of shards can meet old and new ones, so save those to a new folder.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in hf_tensors(model).items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor.contiguous()
        room -= size
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        _replace(folder / name, functools.partial(save_file, shard, metadata={"format": "pt"}))
    kept = set(names)
    if count > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(x.numel() * x.element_size() for shard in shards for x in shard.values())
        _replace_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        kept.add(INDEX)
    config = model.config.to_json() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    _replace_json(folder / "config.json", config)
    for old in folder.iterdir():
        if old.name not in kept and (old.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(old.name)):
            old.unlink()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ModelLoadError(f"{index}: not a safetensors index ({error!r}); download it again") from error
        if bad := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise ModelLoadError(f"{index}: names files outside the folder: {_some(map(str, bad))}")
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise ModelLoadError(f"{folder}: shards named by {INDEX} are missing: {_some(absent)}; download them again")
        return [folder / name for name in names]
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        hint = "pickled weights are not read; save them as safetensors" if pickled else "download the weights"
        raise ModelLoadError(f"{folder}: no {WEIGHTS}; {hint}")
    return files


def _shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                shapes.update({name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{file}: damaged or not safetensors ({error}); download it again") from error
    return shapes


def _read(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                tensor = reader.get_tensor(name)
                _check_finite(file, name, tensor)
                yield name, tensor


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


def _check(targets: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], partial: bool, where: str) -> None:
    """Raises ModelLoadError listing what does not fit. `load_tensors` sees to an `lm_head.weight` of a tied model."""
    given = {checkpoint_name(name): shape for name, shape in shapes.items()}
    missing = [name for name in targets if name not in given]
    extra = [name for name in given if name not in targets and name != _HEAD]
    misshapen = [
        f"{name} is {list(shape)}, config says {list(targets[name].shape)}"
        for name, shape in given.items()
        if name in targets and tuple(targets[name].shape) != shape
    ]
    faults = []
    if missing and not partial:
        faults.append(f"{len(missing)} missing: {_some(missing)}")
    if extra:
        faults.append(f"{len(extra)} unexpected: {_some(extra)}")
    if misshapen:
        faults.append(f"{len(misshapen)} misshapen: {_some(misshapen)}")
    if faults:
        raise ModelLoadError(
            f"{where}: tensors do not fit the config: {'; '.join(faults)}. Use the config.json that belongs "
            "to these weights, or download both again"
        )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - NAMES_SHOWN} more" if len(listed) > NAMES_SHOWN else ""
    return ", ".join(listed[:NAMES_SHOWN]) + more


def _replace_json(path: Path, data: object) -> None:
    _replace(path, lambda temporary: temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside `path`, flushes to the disk, then takes its place: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
