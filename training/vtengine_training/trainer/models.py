"""Which model generates, which one learns, and which one is the reference.

one process             the engine reads the learner's own parameters
several ranks           the learner's lie in pieces on all ranks; each engine has a whole copy, written every step
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from vtengine.engine.base import Backend
from vtengine.model import Qwen2_5_VL, load_model
from vtengine_training.sft.optim import MasterAdamW
from vtengine_training.sync.base import Publisher
from vtengine_training.sync.gathered import CopiedParameters
from vtengine_training.trainer.config import GrpoConfig
from vtengine_training.trainer.policy import Policy
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.recompute import recompute_layers
from vtengine_training.trainer.rollout_engine import build_publisher
from vtengine_training.trainer.sharding import Sharded, shard


@dataclass(frozen=True, eq=False)
class Models:
    """generating: whole, and after each step equal to what is learned: it is also what checkpoints export."""

    generating: Qwen2_5_VL
    policy: Policy
    reference: Policy | None
    optimizer: MasterAdamW

    def publisher(self, config: GrpoConfig, backend: Backend) -> Publisher:
        """How the engine gets what was learned."""
        learned, generating = self.policy.model, self.generating
        onward = build_publisher(config, backend, generating)
        if learned is generating:
            return onward
        return CopiedParameters(onward, generating, learned)


def build_models(
    config: GrpoConfig, folder: Path, device: torch.device, banned: Collection[int], ranks: Ranks
) -> Models:
    """Loads the checkpoint folder. Raises ModelLoadError, or ValueError for what several ranks cannot do."""
    if not ranks.is_alone and config.rollout.backend != "embedded":
        raise ValueError(
            f'rollout.backend = "{config.rollout.backend}": several processes generate with the embedded engine only; '
            "use it, or start one process"
        )
    model = load_model(folder, device, getattr(torch, config.dtype))
    model.visual.requires_grad_(config.update.train_vision)
    if ranks.is_alone:
        policy, reference = _whole(config, folder, model, banned)
    else:
        policy, reference = _sharded(config, model, banned, ranks)
    named = [(name, p) for name, p in policy.model.named_parameters() if p.requires_grad]
    if config.update.recompute:
        recompute_layers(policy.model)
    optimizer = MasterAdamW(named, config.update.optimizer, own_masters=ranks.is_alone)
    return Models(model, policy, reference, optimizer)


def _whole(
    config: GrpoConfig, folder: Path, model: Qwen2_5_VL, banned: Collection[int]
) -> tuple[Policy, Policy | None]:
    update, temperature = config.update, config.rollout.temperature
    fused = update.logits == "fused"
    policy = Policy.build(model, temperature, banned, update.logits_chunk, update.train_vision, fused)
    if not config.loss.kl_coef:
        return policy, None
    frozen = load_model(folder, model.device, model.dtype).requires_grad_(False)
    return policy, Policy.build(frozen, temperature, banned, update.logits_chunk, False, fused)


def _sharded(
    config: GrpoConfig, model: Qwen2_5_VL, banned: Collection[int], ranks: Ranks
) -> tuple[Policy, Policy | None]:
    """Copies of `model` in pieces: float32 masters that learn, and, if it is needed, a frozen one in its own dtype."""
    update, temperature = config.update, config.rollout.temperature

    def policy(sharded: Sharded, train_vision: bool) -> Policy:
        fused = update.logits == "fused"
        return Policy.build(sharded.model, temperature, banned, update.logits_chunk, train_vision, fused, sharded)

    learned = policy(shard(model, ranks, update.train_vision), update.train_vision)
    return learned, policy(shard(model, ranks, frozen=True), False) if config.loss.kl_coef else None
