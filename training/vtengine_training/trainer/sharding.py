"""A model whose parameters lie in pieces on all ranks (FSDP2), gathered layer by layer while they are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vtengine.model import Qwen2_5_VL
from vtengine_training.lora.adapters import Adapters
from vtengine_training.lora.config import LoraConfig
from vtengine_training.trainer.ranks import Ranks


class Pass(nn.Module):
    """Any computation with the model as one forward pass, because FSDP gathers and frees around `forward`."""

    def __init__(self, model: Qwen2_5_VL) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        return compute(*arguments)


@dataclass(frozen=True, eq=False)
class Sharded:
    """model: its parameters are DTensors; use it only inside a call of this object: `sharded(compute, arguments)`.

    A meeting: every rank calls it equally often, and every call reaches every layer, forward and, where there are
    gradients, backward.
    """

    model: Qwen2_5_VL
    whole: Pass
    adapters: Adapters | None = None

    def __call__(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        result = self.whole(compute, *arguments)
        if not torch.is_grad_enabled():
            cast(FSDPModule, self.whole).reshard()  # no backward pass will do it
        return result


def shard(
    full: Qwen2_5_VL,
    ranks: Ranks,
    train_vision: bool = True,
    frozen: bool = False,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> Sharded:
    """A sharded copy of `full`, in float32 (the optimiser's masters), or, frozen, in the dtype of `full`.

    It computes in the dtype of `full`. lora: the copy is frozen and gets adapters in float32; seed: of their values.

    Each decoder layer and vision block is gathered before it runs and freed after; the rest (embedding, head, norms,
    patch embedding, merger) stays gathered for a whole pass. Gradients are summed over the ranks, in float32.
    """
    device, mesh = full.device, ranks.mesh(full.device)
    with torch.device("meta"):
        model = Qwen2_5_VL(full.config)
    adapted = lora is not None and lora.rank > 0
    frozen = frozen or adapted
    model.to(full.dtype if frozen else torch.float32).requires_grad_(not frozen)
    model.visual.requires_grad_(train_vision and not frozen)
    adapters = Adapters.put_into(model, lora) if lora is not None and adapted else None
    policy = MixedPrecisionPolicy(param_dtype=full.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = Pass(model)
    for part in (*model.layers, *model.visual.blocks):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(whole, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in whole.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            copy_into(model.get_parameter(name), parameter)
        for target, value in adapters.initial(seed) if adapters is not None else ():
            copy_into(target, value.to(device))
    return Sharded(model.eval(), whole, adapters)


def copy_into(target: Tensor, source: Tensor) -> None:
    """target: a DTensor; source: the whole tensor, which every rank has. Copies this rank's piece."""
    assert isinstance(target, DTensor)
    piece = distribute_tensor(source.detach(), target.device_mesh, target.placements, src_data_rank=None)
    target.to_local().copy_(piece.to_local())
