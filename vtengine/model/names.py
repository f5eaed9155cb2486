"""The tensors of a checkpoint, by their Hugging Face names, as views of the model's fused parameters.

Inside, q/k/v and gate/up are one matrix each. Loading, saving and updating in place all go through this one table.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vtengine.model.qwen2_5_vl import Qwen2_5_VL

# transformers 5 names -> checkpoint names
_RENAMES = (("model.visual.", "visual."), ("model.language_model.", "model."))


def hf_tensors(
    model: Qwen2_5_VL, of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.detach()
) -> dict[str, Tensor]:
    """Checkpoint name -> view of the parameter that holds it (writing to a view changes the model).

    of: what is viewed of a parameter: its data, or for instance its gradient.
    """
    vision, text = model.config.vision, model.config.text
    pixels = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    named = {"visual.patch_embed.proj.weight": of(model.visual.patch_embed.weight).unflatten(1, pixels)}

    def add(name: str, path: str, **parts: int) -> None:
        """The tensors of the submodule at `path`, or `parts` of their rows (name -> number of rows), under `name`."""
        for kind, parameter in model.get_submodule(path).named_parameters(recurse=False):
            if not parts:
                named[f"{name}.{kind}"] = of(parameter)
                continue
            for part, rows in zip(parts, of(parameter).split(list(parts.values())), strict=True):
                named[f"{name}.{part}.{kind}"] = rows

    for i in range(vision.depth):
        block, inner = f"visual.blocks.{i}", vision.intermediate_size
        for path in ("norm1", "norm2", "attn.qkv", "attn.proj"):
            add(f"{block}.{path}", f"{block}.{path}")
        add(f"{block}.mlp", f"{block}.mlp.gate_up", gate_proj=inner, up_proj=inner)
        add(f"{block}.mlp.down_proj", f"{block}.mlp.down")
    add("visual.merger.ln_q", "visual.merger.ln_q")
    add("visual.merger.mlp.0", "visual.merger.fc1")
    add("visual.merger.mlp.2", "visual.merger.fc2")
    add("model.embed_tokens", "embed_tokens")
    for i in range(text.num_layers):
        layer, ours, inner = f"model.layers.{i}", f"layers.{i}", text.intermediate_size
        kv = text.num_kv_heads * text.head_dim
        add(f"{layer}.input_layernorm", f"{ours}.input_norm")
        add(f"{layer}.self_attn", f"{ours}.attn.qkv", q_proj=text.hidden_size, k_proj=kv, v_proj=kv)
        add(f"{layer}.self_attn.o_proj", f"{ours}.attn.o_proj")
        add(f"{layer}.post_attention_layernorm", f"{ours}.post_norm")
        add(f"{layer}.mlp", f"{ours}.mlp.gate_up", gate_proj=inner, up_proj=inner)
        add(f"{layer}.mlp.down_proj", f"{ours}.mlp.down")
    add("model.norm", "norm")
    if model.lm_head is not None:
        add("lm_head", "lm_head")
    return named


def checkpoint_name(name: str) -> str:
    """The name in released checkpoints of what transformers 5 calls `model.visual.*` or `model.language_model.*`."""
    for prefix, replacement in _RENAMES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name
