"""The configured loss in the words of the kernel that computes it (`vtengine_kernels.grpo_loss`)."""

from __future__ import annotations

from torch import Tensor
from vtengine_kernels.grpo_loss import Objective, Tokens

from vtengine_training.grpo.config import LossConfig
from vtengine_training.trainer.batch import MicroBatch


def kernel_objective(config: LossConfig) -> Objective:
    """The same objective; `grpo.loss` is the reference, and a test holds the two against each other."""
    objective = config.objective
    return Objective(
        policy=objective.policy,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=config.dual_clip,
        kl_coef=config.kl_coef,
        kl=config.kl,
        entropy_coef=config.entropy_coef,
        importance_cap=config.importance_cap,
    )


def kernel_tokens(batch: MicroBatch, old: Tensor | None, reference: Tensor | None) -> Tokens:
    """The batch's trainable tokens. old: log-probabilities that ratios refer to; None = the current ones."""
    return Tokens(batch.advantages, batch.weights, old, batch.rollout, reference, batch.sequences, batch.num_sequences)
