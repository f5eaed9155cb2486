"""Which model generates, which one learns, and which one is the reference.

one process             the engine reads the learner's own parameters, or is sent them (SGLang)
one, sampling ahead     the embedded engine has a copy, written every step
several ranks           the learner's lie in pieces on all ranks; each engine has a whole copy, written every step
several, over servers   no copy: the pieces are gathered part by part, and sent
with adapters           they run in the engine as they are; a whole copy has them in its weights. Without them it is the
                        reference
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from vtengine.engine.base import Backend
from vtengine.model import Checkpoint, VLModel, load_model, load_tensors
from vtengine_training.lora.adapters import Adapters
from vtengine_training.sft.optim import MasterAdamW
from vtengine_training.sync.base import Publisher
from vtengine_training.sync.gathered import CopiedWeights, WeightParts, whole_copy
from vtengine_training.sync.merged import MergedParts
from vtengine_training.trainer.config import GrpoConfig
from vtengine_training.trainer.policy import Policy
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.recompute import recompute_layers
from vtengine_training.trainer.rollout_engine import build_publisher, build_shared_publisher
from vtengine_training.trainer.sharding import shard


@dataclass(frozen=True, eq=False)
class Models:
    """generating: whole, and after each step equal to what is learned; None where servers generate for several ranks.
    dtype: in which the weights go to engines and checkpoints. adapters: on the policy's model, if they learn in place
    of its weights."""

    generating: VLModel | None
    policy: Policy
    reference: Policy | None
    optimizer: MasterAdamW
    dtype: torch.dtype
    adapters: Adapters | None = None

    @property
    def model(self) -> VLModel:
        """The one that generates, or where servers do it for several ranks the learner's, in pieces."""
        return self.generating or self.policy.model

    def publisher(self, config: GrpoConfig, backend: Backend, ranks: Ranks) -> Publisher:
        """How the engine gets what was learned."""
        learned, generating, adapters = self.policy.model, self.generating, self.adapters
        if learned is generating:
            return build_publisher(config, backend, learned, None if adapters is None else adapters.merged)
        parts = MergedParts(adapters) if adapters is not None else WeightParts(learned, self.dtype)
        if generating is None:
            return build_shared_publisher(config, backend, parts, learned.device, ranks)
        return CopiedWeights(build_publisher(config, backend, generating), generating, parts)

    def whole(self, ranks: Ranks, folder: Path) -> VLModel | None:
        """What is learned as one plain model, to be exported; None on ranks but the first where that would take memory.

        A meeting where it lies in pieces. folder: the checkpoint that adapters sit on.
        """
        if self.adapters is not None and self.adapters.model is self.generating:
            return self.adapters.merged_model()
        if self.generating is not None:
            return self.generating
        if self.adapters is None:
            return whole_copy(self.policy.model, self.dtype, keep=ranks.is_first)
        merged = self.adapters.merged()
        if not ranks.is_first:
            deque(merged, maxlen=0)
            return None
        model = load_model(folder, "cpu", self.dtype)
        load_tensors(model, merged, partial=True)
        return model


def build_models(
    config: GrpoConfig, folder: Path, device: torch.device, banned: Collection[int], ranks: Ranks
) -> Models:
    """Loads the checkpoint folder. Raises ModelLoadError, or ValueError for what this number of ranks cannot do."""
    _check(config, device, ranks)
    update, lora = config.update, config.lora
    dtype: torch.dtype = getattr(torch, config.dtype)
    policy_of = partial(
        Policy.build,
        temperature=config.rollout.temperature,
        banned=banned,
        chunk=update.logits_chunk,
        fused=update.logits == "fused",
    )
    generating: VLModel | None = None
    adapters: Adapters | None = None
    if ranks.is_alone or config.rollout.backend == "embedded":
        generating = ranks.together(lambda: load_model(folder, device, dtype))
        generating.visual.requires_grad_(config.trains_vision)
    if generating is not None and ranks.is_alone:
        learned = generating
        if config.rollout.ahead and config.rollout.backend == "embedded":
            learned = deepcopy(generating)
        if lora.rank:
            adapters = Adapters.put_into(learned, lora)
            adapters.begin(config.seed)
        policy = policy_of(learned, train_vision=config.trains_vision)
    else:  # in pieces: float32 that learns, frozen weights in the model's own dtype
        checkpoint = ranks.together(lambda: Checkpoint.open(folder))
        mesh = ranks.mesh(device, update.shard_ranks)  # one for both models: NCCL has buffers for every group
        cut = partial(shard, checkpoint, dtype, device, ranks, mesh=mesh)
        pieces = cut(config.trains_vision, lora=lora, seed=config.seed)
        policy, adapters = policy_of(pieces.model, train_vision=config.trains_vision, enter=pieces), pieces.adapters
    reference = None
    if config.loss.kl_coef:
        if adapters is not None:
            reference = replace(policy, train_vision=False, enter=adapters.switched_off(policy.enter))
        elif ranks.is_alone:
            frozen = load_model(folder, device, dtype).requires_grad_(False)
            reference = policy_of(frozen, train_vision=False)
        else:
            pieces = cut(frozen=True)
            reference = policy_of(pieces.model, train_vision=False, enter=pieces)
    if generating is not None and policy.model is not generating:
        generating.requires_grad_(False)  # a copy that is only written: the engine stores it as it is read fastest
    named = [(name, p) for name, p in policy.model.named_parameters() if p.requires_grad]
    if update.recompute:
        recompute_layers(policy.model, draws=bool(lora.dropout))
    optimizer = MasterAdamW(named, update.optimizer, own_masters=ranks.is_alone and dtype != torch.float32)
    return Models(generating, policy, reference, optimizer, dtype, adapters)


def _check(config: GrpoConfig, device: torch.device, ranks: Ranks) -> None:
    """Raises ValueError for what this device or this number of ranks cannot do."""
    if not ranks.is_alone and config.rollout.backend == "sglang":
        raise ValueError(
            f'rollout.backend = "sglang": each of {ranks.size} processes would start an engine, all on one device; '
            "start servers (python -m sglang.launch_server) and give their addresses: http://host:port,http://..."
        )
    if config.rollout.ahead and config.rollout.backend == "embedded" and device.type == "cuda":
        raise ValueError(
            "rollout.ahead = true: engine and learner would take turns on one GPU, which gains nothing; use SGLang on "
            "GPUs of its own (rollout.backend = http://host:port), or leave it out"
        )
    if ranks.is_alone and config.update.shard_ranks is not None:
        raise ValueError(
            f"update.shard_ranks = {config.update.shard_ranks}: one process holds all the weights; start several with "
            "torchrun, or leave it out"
        )
