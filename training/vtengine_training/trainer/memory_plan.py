"""What a training process takes of its device's memory, for the plan that `--dry-run` prints. Estimates."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from vtengine_training.lora.targets import find_targets
from vtengine_training.trainer.config import GrpoConfig
from vtengine_training.trainer.cost import MIB, ModelCost

GIB = 1 << 30
GPU_BYTES = 3 << 30
"""What no shape says: CUDA's context, NCCL's buffers, CUDA graphs, the engine's image features."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one of `ranks` processes. states: weights, masters, gradients, moments, the reference. keys: and values.
    gathered: by FSDP2. logits: of a chunk. head: the gradient of the output projection. activations, tower: of a
    micro-batch that is full, and has nothing but images. ends: gradients at the end of a pass, when the four before
    are gone."""

    ranks: int
    states: int
    keys: int
    gathered: int
    logits: int
    head: int
    activations: int
    tower: int
    ends: int

    @staticmethod
    def of(config: GrpoConfig, cost: ModelCost) -> MemoryPlan:
        """Of one of WORLD_SIZE processes."""
        update, element = config.update, 4 if config.dtype == "float32" else 2
        ranks, learns = int(os.environ.get("WORLD_SIZE", "1")), not config.lora.rank
        engine, pieces = config.rollout.backend == "embedded", min(ranks, update.shard_ranks or ranks)
        if learns:
            states = cost.training_bytes(element, bool(config.loss.kl_coef), update.train_vision, pieces, engine)
        else:
            states = cost.adapter_bytes(element, num_adapted(config, cost), pieces, engine)
        several = ranks > 1
        return MemoryPlan(
            ranks,
            states,
            config.rollout.kv_mib * MIB * engine,
            cost.gathered_bytes(element, learns) * several,
            (1 if update.logits == "fused" else 3) * 4 * update.logits_chunk * cost.model.config.text.vocab_size,
            cost.head_gradient_bytes(element) * learns,
            cost.activation_bytes(update.max_tokens, element, update.recompute),
            cost.tower_bytes(4 * update.max_tokens, element, update.recompute) * config.trains_vision,
            cost.ends_gradient_bytes(element) * (learns and several),
        )

    @property
    def most(self) -> int:
        """Where all that can come together does; without GPU_BYTES."""
        learning = self.logits + self.head + self.activations + self.tower
        return self.states + self.keys + self.gathered + max(learning, self.ends)

    def lines(self, config: GrpoConfig) -> list[str]:
        """For people; the last one compares it with the GPU that is here, if one is."""
        update = config.update
        rows = {
            "weights, gradients, masters and moments": self.states,
            "keys and values": self.keys,
            "what is whole during a pass": self.gathered,
            "logits": self.logits,
            "the output projection's gradient": self.head,
        }
        parts = ", ".join(f"{size / MIB:,.0f} MiB for {what}" for what, size in rows.items() if size)
        vision = f"; {1000 * self.tower / update.max_tokens / MIB:,.0f} MiB more for every 1,000 visual tokens in it"
        return [
            f"memory{f' of each of {self.ranks} processes' if self.ranks > 1 else ''}: about {parts}",
            f"activations: about {self.activations / MIB:,.0f} MiB for a micro-batch of {update.max_tokens} tokens"
            + vision * bool(self.tower)
            + ("" if update.recompute else " (update.recompute = true: much less)"),
            f"together: about {self.most / GIB:,.1f} GiB, if a micro-batch is full{' of images' * bool(self.tower)}; "
            f"on a GPU {GPU_BYTES / GIB:g} GiB more for CUDA, NCCL and graphs",
            *self._compared(config),
        ]

    def _compared(self, config: GrpoConfig) -> list[str]:
        if config.device == "cpu" or not torch.cuda.is_available():
            return []
        there, needed = torch.cuda.get_device_properties(0).total_memory, self.most + GPU_BYTES
        if needed <= there:
            return [f"this GPU has {there / GIB:,.1f} GiB: enough"]
        return [
            f"TOO LITTLE: this GPU has {there / GIB:,.1f} GiB of the {needed / GIB:,.1f}; update.recompute = true, "
            "lower update.max_tokens or rollout.kv_mib, adapters (lora.rank), or more processes"
        ]


def num_adapted(config: GrpoConfig, cost: ModelCost) -> int:
    """Parameters of the adapters that learn in place of the weights."""
    return sum(target.parameters(config.lora.rank) for target in find_targets(cost.model.config, config.lora))
