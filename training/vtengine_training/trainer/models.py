"""Which model generates, which one learns, and which one is the reference.

one process             the engine reads the learner's own parameters
several ranks           the learner's lie in pieces on all ranks; each engine has a whole copy, written every step
with adapters           they run in the engine as they are; a whole copy has them in its weights. Without them it is the
                        reference
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from vtengine.engine.base import Backend
from vtengine.model import Qwen2_5_VL, load_model
from vtengine_training.lora.adapters import Adapters
from vtengine_training.sft.optim import MasterAdamW
from vtengine_training.sync.base import Publisher
from vtengine_training.sync.gathered import CopiedParameters
from vtengine_training.sync.merged import MergedCopy
from vtengine_training.trainer.config import GrpoConfig
from vtengine_training.trainer.policy import Policy
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.recompute import recompute_layers
from vtengine_training.trainer.rollout_engine import build_publisher
from vtengine_training.trainer.sharding import shard


@dataclass(frozen=True, eq=False)
class Models:
    """generating: whole, and after each step equal to what is learned. adapters: on the policy's model, if they learn
    in place of its weights."""

    generating: Qwen2_5_VL
    policy: Policy
    reference: Policy | None
    optimizer: MasterAdamW
    adapters: Adapters | None = None

    def publisher(self, config: GrpoConfig, backend: Backend) -> Publisher:
        """How the engine gets what was learned."""
        learned, generating, adapters = self.policy.model, self.generating, self.adapters
        onward = build_publisher(config, backend, generating, None if adapters is None else adapters.merged)
        if learned is generating:
            return onward
        if adapters is not None:
            return MergedCopy(onward, generating, adapters.merged)
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
    update, lora = config.update, config.lora
    model = load_model(folder, device, getattr(torch, config.dtype))
    model.visual.requires_grad_(config.trains_vision)
    policy_of = partial(
        Policy.build,
        temperature=config.rollout.temperature,
        banned=banned,
        chunk=update.logits_chunk,
        fused=update.logits == "fused",
    )
    adapters = None
    if ranks.is_alone:
        if lora.rank:
            adapters = Adapters.put_into(model, lora)
            adapters.begin(config.seed)
        policy = policy_of(model, train_vision=config.trains_vision)
    else:  # in pieces: float32 that learns, frozen weights in the model's own dtype
        pieces = shard(model, ranks, config.trains_vision, lora=lora, seed=config.seed)
        policy, adapters = policy_of(pieces.model, train_vision=config.trains_vision, enter=pieces), pieces.adapters
    reference = None
    if config.loss.kl_coef:
        if adapters is not None:
            reference = replace(policy, train_vision=False, enter=adapters.switched_off(policy.enter))
        elif ranks.is_alone:
            frozen = load_model(folder, device, model.dtype).requires_grad_(False)
            reference = policy_of(frozen, train_vision=False)
        else:
            pieces = shard(model, ranks, frozen=True)
            reference = policy_of(pieces.model, train_vision=False, enter=pieces)
    named = [(name, p) for name, p in policy.model.named_parameters() if p.requires_grad]
    if update.recompute:
        recompute_layers(policy.model, draws=bool(lora.dropout))
    optimizer = MasterAdamW(named, update.optimizer, own_masters=ranks.is_alone and model.dtype != torch.float32)
    return Models(model, policy, reference, optimizer, adapters)
