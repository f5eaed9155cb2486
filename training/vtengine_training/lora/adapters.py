"""Adapters put into a model by peft, and what comes of them: merged weights, and the adapter's own files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vtengine.model import VLModel, hf_tensors, load_tensors, meta_model
from vtengine.model.linear import Linear
from vtengine.model.names import transformers_name
from vtengine_training.lora.config import LoraConfig
from vtengine_training.lora.layers import ADAPTER, AdaptedLinear, LearningDropout, Switch
from vtengine_training.lora.targets import Target, find_targets
from vtengine_training.sync.gathered import gathered

WEIGHTS = "adapter_model.safetensors"
KINDS = ("lora_A", "lora_B")
PREFIX = "base_model.model."
"""Before the names in peft's files."""


@dataclass(frozen=True, eq=False)
class Adapters:
    """Those of a model. Where the model is sharded, `tensors` and `merged` are meetings of all ranks."""

    model: VLModel
    config: LoraConfig
    targets: list[Target]
    switch: Switch

    @staticmethod
    def put_into(model: VLModel, config: LoraConfig) -> Adapters:
        """Freezes the model and gives it adapters without effect: of its own dtype, on its own device.

        `begin` sets their values. Raises ValueError: peft is missing, or targets that are not there (`find_targets`).
        """
        targets = find_targets(model.config, config)
        peft = import_peft(config)
        switch = Switch()
        model.requires_grad_(False)
        by_path: dict[str, list[Target]] = {}
        for target in targets:
            by_path.setdefault(target.path, []).append(target)
        for path, parts in by_path.items():
            base = model.get_submodule(path)
            assert isinstance(base, Linear)
            named = [(_leaf(part.name), part.begin, part.end) for part in parts]
            model.set_submodule(path, AdaptedLinear(base, named, switch))
        where = [_module(target) for target in targets]
        settings = peft_config(peft, config, where)
        peft.inject_adapter_in_model(settings, model, ADAPTER, low_cpu_mem_usage=model.device.type == "meta")
        adapters = Adapters(model.eval(), config, targets, switch)
        if config.dropout:
            for layer in adapters.layers().values():
                layer.lora_dropout[ADAPTER] = LearningDropout(config.dropout)
        return adapters

    def layers(self) -> dict[str, Any]:
        """peft's layer of each target, by the target's name in a checkpoint."""
        return {target.name: self.model.get_submodule(_module(target)) for target in self.targets}

    def initial(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, whole tensor of float32) of where training begins: A uniform as peft makes it, B zero.

        The same whatever the number of ranks.
        """
        generator = torch.Generator().manual_seed(seed)
        for target, layer in zip(self.targets, self.layers().values(), strict=True):
            down = torch.empty(self.config.rank, target.inputs)
            nn.init.kaiming_uniform_(down, math.sqrt(5), generator=generator)
            yield layer.lora_A[ADAPTER].weight, down
            yield layer.lora_B[ADAPTER].weight, torch.zeros(target.end - target.begin, self.config.rank)

    @torch.no_grad()
    def begin(self, seed: int) -> None:
        """Of a model that is whole: gives the adapters the values that training begins with."""
        for parameter, value in self.initial(seed):
            parameter.copy_(value)

    def switched_off(self, enter: Callable[..., Any]) -> Callable[..., Any]:
        """`enter`, a call of functions that use the model, with the model as training began with it."""

        def without(function: Callable[..., Any], *arguments: Any) -> Any:
            with self.switch.off():
                return enter(function, *arguments)

        return without

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """A and B of each target as peft's files name them, whole, on the CPU."""
        found = {}
        for name, layer in self.layers().items():
            for kind in KINDS:
                weight = getattr(layer, kind)[ADAPTER].weight
                found[f"{PREFIX}{transformers_name(name)}.{kind}.weight"] = gathered(weight, weight.dtype).cpu()
        return found

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, W + alpha / rank * B A) of each target, whole, one after the other.

        Added in float32 and rounded once to the model's dtype.
        """
        path, whole = "", torch.empty(0)
        for target, layer in zip(self.targets, self.layers().values(), strict=True):
            if target.path != path:  # of q, k and v the first: the others are rows of the same matrix
                path, whole = target.path, gathered(self.model.get_parameter(f"{target.path}.weight"), self.model.dtype)
            down, up = (gathered(getattr(layer, kind)[ADAPTER].weight, torch.float32) for kind in KINDS)
            base = whole[target.begin : target.end].float()
            merged = torch.addmm(base, up, down, alpha=layer.scaling[ADAPTER])
            yield f"{target.name}.weight", merged.to(self.model.dtype)

    def merged_model(self) -> VLModel:
        """A plain model on the CPU with the adapters in its weights. Of a model that is whole in this process."""
        model = meta_model(self.model.config)
        model.to(self.model.dtype).to_empty(device="cpu")
        load_tensors(model, hf_tensors(self.model).items())
        load_tensors(model, self.merged(), partial=True)
        return model.eval()


def save_adapter(tensors: dict[str, Tensor], adapters: Adapters, base: Path, folder: Path) -> None:
    """Writes what `PeftModel.from_pretrained` puts onto the base model. tensors: of `tensors`; base: a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = [transformers_name(target.name) for target in adapters.targets]
    settings = peft_config(import_peft(adapters.config), adapters.config, modules)
    settings.base_model_name_or_path, settings.inference_mode = str(base), True
    settings.save_pretrained(str(folder))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def peft_config(peft: Any, config: LoraConfig, modules: list[str]) -> Any:
    """peft's own configuration for these modules."""
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=modules,
        bias="none",
        task_type="CAUSAL_LM",
    )


def import_peft(config: LoraConfig) -> Any:
    """The library. Raises ValueError with the remedy."""
    try:
        import peft
    except ImportError as fault:  # peft is missing, or too old for the transformers beside it
        raise ValueError(
            f"lora.rank = {config.rank}: peft cannot be imported ({fault}); pip install --upgrade 'vtengine[lora]'"
        ) from fault
    return peft


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _module(target: Target) -> str:
    """Where in our model peft's layer of a target is."""
    return f"{target.path}.{_leaf(target.name)}"
