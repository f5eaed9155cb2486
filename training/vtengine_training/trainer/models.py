"""Which model generates, which one learns, and which one is the reference.

one process             the engine reads the learner's own parameters
several ranks           the learner's lie in pieces on all ranks; each engine has a whole copy, written every step
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
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
from vtengine_training.trainer.sharding import shard


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
    update, needs_reference = config.update, bool(config.loss.kl_coef)
    model = load_model(folder, device, getattr(torch, config.dtype))
    model.visual.requires_grad_(update.train_vision)
    policy_of = partial(
        Policy.build,
        temperature=config.rollout.temperature,
        banned=banned,
        chunk=update.logits_chunk,
        fused=update.logits == "fused",
    )
    reference = None
    if ranks.is_alone:
        policy = policy_of(model, train_vision=update.train_vision)
        if needs_reference:
            frozen = load_model(folder, device, model.dtype).requires_grad_(False)
            reference = policy_of(frozen, train_vision=False)
    else:  # in pieces: float32 masters that learn, and a frozen copy in the model's own dtype
        pieces = shard(model, ranks, update.train_vision)
        policy = policy_of(pieces.model, train_vision=update.train_vision, enter=pieces)
        if needs_reference:
            pieces = shard(model, ranks, frozen=True)
            reference = policy_of(pieces.model, train_vision=False, enter=pieces)
    named = [(name, p) for name, p in policy.model.named_parameters() if p.requires_grad]
    if update.recompute:
        recompute_layers(policy.model)
    optimizer = MasterAdamW(named, update.optimizer, own_masters=ranks.is_alone and model.dtype != torch.float32)
    return Models(model, policy, reference, optimizer)
