"""Checkpoints: Hugging Face safetensors in and out. Nothing is unpickled, nothing is left half written."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vtengine.model.checkpoint import HEAD, INDEX, WEIGHTS, Checkpoint, check_kind, check_shapes, some
from vtengine.model.config import ModelLoadError
from vtengine.model.families import meta_model
from vtengine.model.huge_pages import prefer_huge_pages
from vtengine.model.language import VLModel
from vtengine.model.names import checkpoint_name, hf_parts, hf_tensors, transformers_name

SHARD_BYTES = 5_000_000_000

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_EMBED = "model.embed_tokens.weight"


def load_tensors(
    model: VLModel, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], partial: bool = False
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
            if known == HEAD and HEAD not in targets:
                head = tensor
                continue
            target = targets.get(known)
            if target is None or target.shape != tensor.shape:
                expected = "no tensor of this name" if target is None else list(target.shape)
                raise ModelLoadError(f"weight update: {name} is {list(tensor.shape)}, the config says {expected}")
            check_kind(name, tensor)
            target.copy_(tensor)
            seen.add(known)
    if not partial and (missing := [name for name in targets if name not in seen]):
        raise ModelLoadError(f"weight update: {len(missing)} tensors missing: {some(missing)}")
    if head is not None and _EMBED in seen:
        _check_tied(head, targets[_EMBED])


def _fitting(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], partial: bool) -> dict[str, Tensor]:
    """`tensors` by checkpoint name, a tied model's head left out. Raises ModelLoadError for whatever does not fit."""
    check_shapes(targets, {name: tuple(x.shape) for name, x in tensors.items()}, partial, "weight update")
    for name, tensor in tensors.items():
        check_kind(name, tensor)
    given = {checkpoint_name(name): tensor for name, tensor in tensors.items()}
    if HEAD not in targets and (head := given.pop(HEAD, None)) is not None and _EMBED in given:
        _check_tied(head, given[_EMBED])
    return given


def _check_tied(head: Tensor, embed: Tensor) -> None:
    if not torch.equal(head.to(embed), embed):
        raise ModelLoadError(
            f"{HEAD} differs from {_EMBED}, but the config says tie_word_embeddings: true; set it to false in "
            f"config.json, or delete {HEAD}"
        )


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> VLModel:
    """Loads a checkpoint folder (config.json and *.safetensors).

    Raises ModelLoadError: for what does not fit, before it takes memory; for NaN or infinity, on coming to it.
    """
    checkpoint = Checkpoint.open(path)
    model = meta_model(checkpoint.config)
    model.to(dtype).to_empty(device=device)
    prefer_huge_pages(model.parameters())
    load_tensors(model, checkpoint.tensors())
    return model.eval()


@torch.no_grad()
def load_rows(
    model: VLModel,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    own: Callable[[nn.Parameter], tuple[Tensor, int]],
) -> None:
    """Of a model in pieces: copies a checkpoint's values into the rows that are here, one tensor's at a time.

    own: of a parameter, its rows in this process (a tensor to write to) and the number of the first. dtype: what values
    are rounded to on the way, as `load_model` rounds them. Raises ModelLoadError on coming to NaN or infinity, to a
    quantised tensor, or to a head that is not the embedding where the config says so.
    """
    for parameter, parts in hf_parts(model):
        here, first = own(parameter)
        done = 0
        for name, count in parts:
            begin, end = max(first, done), min(first + len(here), done + count)
            if begin < end:
                rows = checkpoint.rows(name, begin - done, end - done).to(dtype)
                here[begin - first : end - first].copy_(rows.flatten(1) if rows.ndim > here.ndim else rows)
            done += count
        if parameter is model.embed_tokens.weight and model.lm_head is None and HEAD in checkpoint.places and len(here):
            _check_tied(checkpoint.rows(HEAD, first, first + len(here)).to(dtype), here)


def save_model(model: VLModel, path: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
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
        shards[-1][transformers_name(name) if model.nested_names else name] = tensor.contiguous()
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
