"""A model whose parameters lie in pieces on all ranks (FSDP2), gathered layer by layer while they are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vtengine.model import Checkpoint, VLModel, load_rows, meta_model
from vtengine_training.lora.adapters import Adapters
from vtengine_training.lora.config import LoraConfig
from vtengine_training.trainer.ranks import Ranks


class Pass(nn.Module):
    """Any computation with the model as one forward pass, because FSDP gathers and frees around `forward`."""

    def __init__(self, model: VLModel) -> None:
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

    model: VLModel
    whole: Pass
    adapters: Adapters | None = None

    def __call__(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        result = self.whole(compute, *arguments)
        if not torch.is_grad_enabled():
            cast(FSDPModule, self.whole).reshard()  # no backward pass will do it
        return result

    def sum_copies(self, now: bool) -> None:
        """HSDP: whether the next backward pass sums the gradients over the copies, those of the passes before it too.

        Every rank says the same. Without copies it changes nothing.
        """
        cast(FSDPModule, self.whole).set_requires_all_reduce(now)


def shard(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    train_vision: bool = True,
    frozen: bool = False,
    lora: LoraConfig | None = None,
    seed: int = 0,
    mesh: DeviceMesh | None = None,
) -> Sharded:
    """The checkpoint's model in pieces, in float32 (the optimiser's masters), or, frozen, in `dtype`.

    It computes in `dtype`. lora: the weights are frozen and get adapters in float32; seed: of their values. A rank
    reads its own rows of the files and no others: beside its piece it holds those of one tensor at a time.

    Each decoder layer and vision block is gathered before it runs and freed after; the rest (embedding, head, norms,
    patch embedding, merger) stays gathered for a whole pass. Gradients are summed over the ranks, in float32.
    mesh: of `ranks.mesh`; if it has rows, the ranks of a row hold a whole model together, the next row another copy, so
    that what is gathered for each layer stays in a row (HSDP). None: all ranks hold one.
    Raises ModelLoadError, or ValueError, on all ranks, where one of them meets NaN or a damaged file.
    """
    model = meta_model(checkpoint.config)
    adapted = lora is not None and lora.rank > 0
    frozen = frozen or adapted
    model.to(dtype if frozen else torch.float32).requires_grad_(not frozen)
    model.visual.requires_grad_(train_vision and not frozen)
    adapters = Adapters.put_into(model, lora) if lora is not None and adapted else None
    whole = _cut(model, dtype, mesh or ranks.mesh(device))
    model.to_empty(device=device)
    ranks.together(lambda: load_rows(model, checkpoint, dtype, own_rows))
    with torch.no_grad():
        for target, value in adapters.initial(seed) if adapters is not None else ():
            here, first = own_rows(target)
            here.copy_(value[first : first + len(here)])
    return Sharded(model.eval(), whole, adapters)


def _cut(model: VLModel, dtype: torch.dtype, mesh: DeviceMesh) -> Pass:
    """Every parameter becomes a DTensor."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = Pass(model)
    for part in (*model.layers, *model.visual.blocks):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(whole, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in whole.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return whole


def own_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """(this rank's rows of a DTensor that is cut as `Tensor.chunk` cuts, the number of the first)."""
    assert isinstance(parameter, DTensor)
    mesh, total = parameter.device_mesh, len(parameter)
    pieces = mesh.ndim - 1  # its last dimension; a first one would count copies
    rows = -(-total // mesh.size(pieces))
    here, first = parameter.to_local(), min(mesh.get_local_rank(pieces) * rows, total)
    assert len(here) == min(rows, total - first)
    return here, first
