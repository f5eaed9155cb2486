"""What a training process takes of its device's memory, for the plan that `--dry-run` prints. Estimates."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vtengine.engine.embedded.config import FREE_SHARE
from vtengine.model import ModelConfig
from vtengine.protocol.conversation import Limits
from vtengine_training.lora.targets import find_targets
from vtengine_training.trainer.config import GrpoConfig
from vtengine_training.trainer.cost import MIB, ModelCost

GIB = 1 << 30
GPU_BYTES = 3 << 30
"""What no shape says: CUDA's context, NCCL's buffers, CUDA graphs, the engine's image features."""
USABLE = 0.95
"""Of a GPU, for the estimates and the pool of keys and values together: torch's blocks have gaps."""
LEAST_KV_BYTES = 1 << 30
"""Of keys and values in main memory, and on a GPU that the estimates leave less of."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one of `ranks` processes. gpu: what it can have of one; None: it is in main memory. states: weights,
    masters, gradients, moments, the reference. gathered: by FSDP2. logits: of a chunk. head: the gradient of the output
    projection. activations, tower: of a micro-batch that is full, and has nothing but images. ends: gradients at the
    end of a pass, when the four before are gone. keys: and values, of the embedded engine."""

    ranks: int
    gpu: int | None
    states: int
    gathered: int
    logits: int
    head: int
    activations: int
    tower: int
    ends: int
    keys: int = 0

    @staticmethod
    def of(config: GrpoConfig, cost: ModelCost, gpu: int | None = None) -> MemoryPlan:
        """Of one of WORLD_SIZE processes. gpu: see `trainer.memory.gpu_bytes`.

        Keys and values get rollout.kv_mib, or on a GPU what all else leaves, at most the share that an engine alone
        would take: it is made before gradients, moments and activations are there.
        """
        update, element = config.update, 4 if config.dtype == "float32" else 2
        ranks, learns = int(os.environ.get("WORLD_SIZE", "1")), not config.lora.rank
        engine, pieces = config.rollout.backend == "embedded", min(ranks, update.shard_ranks or ranks)
        copy = engine and (ranks > 1 or config.rollout.ahead)
        if learns:
            states = cost.training_bytes(element, bool(config.loss.kl_coef), update.train_vision, pieces, copy)
        else:
            states = cost.adapter_bytes(element, num_adapted(config, cost), pieces, copy)
        several = ranks > 1
        plan = MemoryPlan(
            ranks,
            gpu,
            states,
            cost.gathered_bytes(element, learns) * several,
            (1 if update.logits == "fused" else 3) * 4 * update.logits_chunk * cost.model.config.text.vocab_size,
            cost.head_gradient_bytes(element) * learns,
            cost.activation_bytes(update.max_tokens, element, update.recompute),
            cost.tower_bytes(4 * update.max_tokens, element, update.recompute) * config.trains_vision,
            cost.ends_gradient_bytes(element) * (learns and several),
        )
        return replace(plan, keys=plan._keys(config.rollout.kv_mib) * engine)

    def _keys(self, mib: int | None) -> int:
        if mib is not None:
            return mib * MIB
        if self.gpu is None:
            return LEAST_KV_BYTES
        left = min(int(USABLE * self.gpu) - self.most - GPU_BYTES, int(FREE_SHARE * self.gpu))
        return max(left, LEAST_KV_BYTES)

    @property
    def most(self) -> int:
        """Where all that can come together does; without GPU_BYTES."""
        learning = self.logits + self.head + self.activations + self.tower
        return self.states + self.keys + self.gathered + max(learning, self.ends)

    def lines(self, config: GrpoConfig, cost: ModelCost) -> list[str]:
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
            *self._pool(config, cost),
            f"together: about {self.most / GIB:,.1f} GiB, if a micro-batch is full{' of images' * bool(self.tower)}; "
            f"on a GPU {GPU_BYTES / GIB:g} GiB more for CUDA, NCCL and graphs",
            *self._compared(),
        ]

    def _pool(self, config: GrpoConfig, cost: ModelCost) -> Iterator[str]:
        if not self.keys:
            return
        where = "rollout.kv_mib"
        if config.rollout.kv_mib is None and self.gpu is None:
            where = "in main memory, unless rollout.kv_mib says otherwise; on a GPU they get what the rest leaves of it"
        elif config.rollout.kv_mib is None:
            where = "what the rest leaves of this GPU, unless rollout.kv_mib says otherwise"
        yield f"keys and values: room for {self.keys // key_bytes(config, cost.model.config):,} tokens ({where})"
        is_of_this_machine = self.gpu is not None or config.device == "cpu" or config.rollout.kv_mib is not None
        if is_of_this_machine and (words := too_few_keys(config, cost.model.config, self.keys)):
            yield f"SLOW: {words}"

    def _compared(self) -> list[str]:
        if self.gpu is None:
            return []
        there, needed = f"this GPU has {self.gpu / GIB:,.1f} GiB free", self.most + GPU_BYTES
        if needed <= self.gpu:
            return [f"{there}: enough"]
        return [
            f"TOO LITTLE: {there} of the {needed / GIB:,.1f}; update.recompute = true, "
            "lower update.max_tokens or rollout.kv_mib, adapters (lora.rank), or more processes"
        ]


def key_bytes(config: GrpoConfig, model: ModelConfig) -> int:
    """Of a token's keys and values in all layers."""
    text, element = model.text, 4 if config.dtype == "float32" else 2
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * element


def too_few_keys(config: GrpoConfig, model: ModelConfig, size: int) -> str | None:
    """Where a pool of `size` bytes cannot hold what rollout.concurrency sequences may sample: what to do."""
    rollout = config.rollout
    turns = Limits(rollout.resolution, rollout.max_turns).num_turns
    length = min(turns * rollout.max_new_tokens, rollout.max_context_tokens or math.inf)
    held = int(size // (key_bytes(config, model) * length))
    if held >= rollout.concurrency:
        return None
    return (
        f"{size / MIB:,.0f} MiB of keys and values hold {held:,} sequences of {length:,} sampled tokens, prompts and "
        f"images aside; rollout.concurrency is {rollout.concurrency}: where answers get that long, some wait and are "
        "computed again; raise rollout.kv_mib, or lower rollout.concurrency or rollout.max_new_tokens"
    )


def num_adapted(config: GrpoConfig, cost: ModelCost) -> int:
    """Parameters of the adapters that learn in place of the weights."""
    return sum(target.parameters(config.lora.rank) for target in find_targets(cost.model.config, config.lora))
