"""Checkpoints: Hugging Face safetensors in and out. Nothing is unpickled, nothing is left half written.

Inside, q/k/v and gate/up are fused. `hf_tensors` names slices of the fused parameters as checkpoints do, so loading,
saving and updating in place all go through one table.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vtengine.model.config import ModelConfig, ModelLoadError
from vtengine.model.qwen2_5_vl import Qwen2_5_VL

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
NAMES_SHOWN = 8

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# transformers 5 names -> checkpoint names
_RENAMES = (("model.visual.", "visual."), ("model.language_model.", "model."), ("language_model.", "model."))


def hf_tensors(
    model: Qwen2_5_VL, of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.data
) -> dict[str, Tensor]:
    """Checkpoint name -> view of the parameter that holds it (writing to a view changes the model).

    of: what is viewed of a parameter: its data, or for instance its gradient.
    """
    config, visual = model.config, model.visual
    patch = config.vision
    embed = of(visual.patch_embed.weight)
    shape = (patch.hidden_size, patch.in_channels, patch.temporal_patch_size, patch.patch_size, patch.patch_size)
    named: dict[str, Tensor] = {"visual.patch_embed.proj.weight": embed.view(shape)}

    def add(name: str, module: nn.Module, *parts: tuple[str, int]) -> None:
        """A module's tensors under `name`, or slices of their rows under `name` + part."""
        for kind, parameter in module.named_parameters(recurse=False):
            if not parts:
                named[f"{name}.{kind}"] = of(parameter)
            else:
                slices = of(parameter).split([rows for _, rows in parts])
                named.update({f"{name}.{part}.{kind}": x for (part, _), x in zip(parts, slices, strict=True)})

    for i, block in enumerate(visual.blocks):
        base = f"visual.blocks.{i}"
        for part in ("norm1", "norm2", "attn.qkv", "attn.proj"):
            add(f"{base}.{part}", block.get_submodule(part))
        add(
            f"{base}.mlp",
            block.mlp.gate_up,
            ("gate_proj", patch.intermediate_size),
            ("up_proj", patch.intermediate_size),
        )
        add(f"{base}.mlp.down_proj", block.mlp.down)
    add("visual.merger.ln_q", visual.merger.ln_q)
    add("visual.merger.mlp.0", visual.merger.fc1)
    add("visual.merger.mlp.2", visual.merger.fc2)
    text = config.text
    kv = text.num_kv_heads * text.head_dim
    add("model.embed_tokens", model.embed_tokens)
    for i, layer in enumerate(model.layers):
        base = f"model.layers.{i}"
        add(f"{base}.input_layernorm", layer.input_norm)
        add(f"{base}.self_attn", layer.attn.qkv, ("q_proj", text.hidden_size), ("k_proj", kv), ("v_proj", kv))
        add(f"{base}.self_attn.o_proj", layer.attn.o_proj)
        add(f"{base}.post_attention_layernorm", layer.post_norm)
        add(
            f"{base}.mlp", layer.mlp.gate_up, ("gate_proj", text.intermediate_size), ("up_proj", text.intermediate_size)
        )
        add(f"{base}.mlp.down_proj", layer.mlp.down)
    add("model.norm", model.norm)
    if model.lm_head is not None:
        add("lm_head", model.lm_head)
    return named


def checkpoint_name(name: str) -> str:
    """The released checkpoints' name of a tensor that transformers 5 calls `model.visual.*` or `model.language_model.*`."""
    for prefix, replacement in _RENAMES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def load_tensors(
    model: Qwen2_5_VL, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], partial: bool = False
) -> None:
    """Copies checkpoint tensors into the model in place, casting to its dtype and device.

    tensors: by checkpoint or transformers 5 name; an iterable is consumed one tensor at a time.
    partial: tensors may be missing (a weight update in buckets). Raises ModelLoadError that lists missing, unexpected and
    misshapen tensors; a mapping with a fault changes nothing.
    """
    targets = hf_tensors(model)
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    if isinstance(tensors, Mapping):
        _check(targets, {name: tuple(x.shape) for name, x in tensors.items()}, partial, "tensors")
    with torch.no_grad():
        for name, tensor in items:
            target = targets.get(checkpoint_name(name))
            if target is not None:
                target.copy_(tensor)
            elif not _check_tied(model, tensor):
                raise ModelLoadError(
                    f"{name} differs from model.embed_tokens.weight, but the config says tie_word_embeddings: true; "
                    "set it to false, or delete the tensor"
                )


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Qwen2_5_VL:
    """Loads a checkpoint folder (config.json and *.safetensors). Raises ModelLoadError, before memory is taken for weights."""
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
        _replace(folder / name, lambda temporary, shard=shard: save_file(shard, temporary, metadata={"format": "pt"}))
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
            for name in sorted(
                reader.keys(), reverse=True
            ):  # model.embed_tokens before lm_head, which may be tied to it
                yield name, reader.get_tensor(name)


def _check(targets: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], partial: bool, where: str) -> None:
    """`lm_head.weight` of a tied model is no fault here: `load_tensors` compares its values."""
    given = {checkpoint_name(name): shape for name, shape in shapes.items()}
    missing = [name for name in targets if name not in given]
    extra = [name for name in given if name not in targets and name != "lm_head.weight"]
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
            f"{where}: tensors do not fit the config: {'; '.join(faults)}. Use the config.json that belongs to these weights"
        )


def _check_tied(model: Qwen2_5_VL, head: Tensor) -> bool:
    embed = model.embed_tokens.weight
    return head.shape == embed.shape and torch.equal(head.to(embed), embed)


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
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
