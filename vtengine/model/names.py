"""The tensors of a checkpoint, by their Hugging Face names, as views of the model's fused parameters.

Inside, q/k/v and gate/up are one matrix each. Loading, saving and updating in place all go through this one table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from vtengine.model.language import VLModel
from vtengine.model.tower import Names

PATCHES = "visual.patch_embed.proj.weight"
"""[hidden, channels, temporal, patch, patch] in a checkpoint, [hidden, values of a patch] here."""

# names of transformers 5, and of Qwen3-VL's checkpoints -> of Qwen2.5-VL's checkpoints, which we use for all
_RENAMES = (("model.visual.", "visual."), ("model.language_model.", "model."))


def hf_tensors(
    model: VLModel, of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.detach()
) -> dict[str, Tensor]:
    """Checkpoint name -> view of the parameter that holds it (writing to a view changes the model).

    of: what is viewed of a parameter: its data, or for instance its gradient.
    """
    return dict(hf_views(model, of))


def hf_views(model: VLModel, of: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same one after another: `of` is called once for each parameter, when its first tensor is asked for."""
    vision = model.config.vision
    pixels = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    for parameter, parts in hf_parts(model):
        whole = of(parameter)
        pieces = whole.split([rows for _, rows in parts]) if len(parts) > 1 else (whole,)
        for (name, _), piece in zip(parts, pieces, strict=True):
            yield name, piece.unflatten(1, pixels) if name == PATCHES else piece


def hf_parts(model: VLModel) -> Iterator[tuple[nn.Parameter, list[tuple[str, int]]]]:
    """Every parameter, and the tensors of a checkpoint that it is made of: name and number of rows, in order."""
    for path, modules in hf_modules(model).items():
        for kind, parameter in model.get_submodule(path).named_parameters(recurse=False):
            yield parameter, [(f"{name}.{kind}", rows or len(parameter)) for name, rows in modules.items()]


def hf_modules(model: VLModel) -> Names:
    """Path of a module of ours -> the checkpoint's modules that its rows belong to, in order, and how many each has.

    The only one: 0, for all of them.
    """
    text = model.config.text
    found: Names = {}
    for path, modules in model.visual.names().items():
        found[f"visual.{path}"] = {f"visual.{name}": rows for name, rows in modules.items()}
    found["embed_tokens"] = {"model.embed_tokens": 0}
    for i in range(text.num_layers):
        layer, ours, inner = f"model.layers.{i}", f"layers.{i}", text.intermediate_size
        rows = {"q_proj": text.q_size, "k_proj": text.kv_size, "v_proj": text.kv_size}
        found[f"{ours}.input_norm"] = {f"{layer}.input_layernorm": 0}
        found[f"{ours}.attn.qkv"] = {f"{layer}.self_attn.{name}": count for name, count in rows.items()}
        for path in (*model.head_norms, "o_proj"):
            found[f"{ours}.attn.{path}"] = {f"{layer}.self_attn.{path}": 0}
        found[f"{ours}.post_norm"] = {f"{layer}.post_attention_layernorm": 0}
        found[f"{ours}.mlp.gate_up"] = {f"{layer}.mlp.gate_proj": inner, f"{layer}.mlp.up_proj": inner}
        found[f"{ours}.mlp.down"] = {f"{layer}.mlp.down_proj": 0}
    found["norm"] = {"model.norm": 0}
    if model.lm_head is not None:
        found["lm_head"] = {"lm_head": 0}
    return found


def checkpoint_name(name: str) -> str:
    """How we call what transformers 5 and newer checkpoints call `model.visual.*` or `model.language_model.*`."""
    for prefix, replacement in _RENAMES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def transformers_name(name: str) -> str:
    """The other way round: what transformers 5 calls a module or tensor."""
    for prefix, replacement in _RENAMES:
        if name.startswith(replacement):
            return prefix + name.removeprefix(replacement)
    return name
