"""One training step's learning: one optimiser update per mini-batch, one forward and backward pass per micro-batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vtengine_training.grpo.config import LossConfig
from vtengine_training.grpo.loss import LossResult, Tokens, grpo_loss, mismatch_figures
from vtengine_training.sft.optim import MasterAdamW
from vtengine_training.trainer.batch import MicroBatch
from vtengine_training.trainer.config import UpdateConfig
from vtengine_training.trainer.figures import StepFigures, read
from vtengine_training.trainer.minibatch import Cutter, MiniBatch
from vtengine_training.trainer.objective import kernel_objective, kernel_tokens
from vtengine_training.trainer.policy import Policy
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.sharding import Sharded
from vtengine_training.trainer.trajectory import Group


class TrainingDiverged(RuntimeError):
    """Too many updates in a row without finite gradients."""


class Learner:
    """Turns groups into updates. `version` counts the updates made; `skipped` those in a row that were not finite.

    Each rank brings its own groups, and may learn from others' (`Cutter`). A micro-batch is on the model's device only
    while it is worked on.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        optimizer: MasterAdamW,
        loss: LossConfig,
        update: UpdateConfig,
        constant_length: int,
        ranks: Ranks | None = None,
    ) -> None:
        if loss.kl_coef and reference is None:
            raise ValueError(f"loss.kl_coef = {loss.kl_coef}: needs a reference model")
        self.policy, self.reference, self.optimizer = policy, reference, optimizer
        self.loss, self.update, self.ranks = loss, update, ranks or Ranks()
        constant_length = update.constant_length or constant_length
        self.cutter = Cutter(policy, update, loss.objective.aggregation, constant_length, self.ranks)
        self.version = 0
        self.skipped = 0

    def learn(self, groups: Sequence[Group], rate: float) -> dict[str, float]:
        """Every update of one training step; returns the metrics, named as in the log.

        Raises TrainingDiverged after update.max_skipped updates in a row whose loss or gradients were not finite.
        """
        began = self.version
        minibatches = self.cutter.cut(groups)
        updates = len(minibatches) * self.update.epochs
        if self.loss.old_logprobs == "recompute":
            minibatches = self._recomputed(minibatches, groups)
        if self.reference is not None and self.update.epochs > 1:
            minibatches = [replace(one, reference=self._logprobs(self.reference, one)) for one in minibatches]
        figures = StepFigures()
        for epoch in range(self.update.epochs):
            for index, minibatch in enumerate(minibatches):
                fresh = epoch == 0 and (index == 0 or minibatch.old is not None)
                self._update(minibatch, rate, figures, began if fresh else None)
        counted = {"lr": rate, "updates": float(updates), "version": float(self.version)}
        return figures.means(self.ranks) | counted

    def backward(self, minibatch: MiniBatch, figures: StepFigures, sampled_by: int | None = None) -> float:
        """Adds the mini-batch's gradients to the model's; returns its loss.

        sampled_by: the version whose samples are compared with the engine's log-probabilities; None = no comparison.
        """
        loss = 0.0
        for index in range(len(minibatch.batches)):
            if isinstance(self.policy.enter, Sharded):
                self.policy.enter.sum_copies(index == len(minibatch.batches) - 1)
            found = self._backward(minibatch, index, sampled_by)
            loss += found.pop("loss")
            if index < minibatch.num_own:
                figures.add(found)
        return loss

    def _backward(self, minibatch: MiniBatch, index: int, sampled_by: int | None) -> dict[str, float]:
        """`backward` of one micro-batch, which leaves the device with the return: its loss and figures."""
        batch = minibatch.batches[index].to(self.policy.model.device)
        old = None if minibatch.old is None else minibatch.old[index]
        reference = None if minibatch.reference is None else minibatch.reference[index]
        if self.reference is not None and reference is None:
            reference = _without_gradients(self.reference, batch)
        logprobs, result = self._loss(batch, old, reference)
        figures = {"loss": result.total, **result.figures}
        if sampled_by is not None:
            seen = logprobs if old is None else old
            figures |= mismatch_figures(seen.detach(), batch.rollout, batch.versions == sampled_by)
        result.total.backward()  # type: ignore[no-untyped-call]
        patches = 0 if batch.pixel_values is None else len(batch.pixel_values)
        return read(figures) | {"tokens/packed": len(batch.token_ids), "patches/encoded": patches}

    def _loss(self, batch: MicroBatch, old: Tensor | None, reference: Tensor | None) -> tuple[Tensor, LossResult]:
        """(log-probabilities, the batch's loss and figures); by the kernel where the policy is fused."""
        before = batch.rollout if self.loss.old_logprobs == "rollout" else old
        fused = None
        if self.policy.fused:
            fused = self.policy.loss(batch, kernel_tokens(batch, before, reference), kernel_objective(self.loss))
            logprobs, entropy = fused.logprobs, fused.entropies
        else:
            logprobs, entropy = self.policy.logprobs(batch)
        tokens = Tokens(
            logprobs.detach() if before is None else before,
            batch.rollout,
            batch.advantages,
            batch.weights,
            batch.sequences,
            batch.num_sequences,
            reference,
        )
        result = grpo_loss(logprobs, tokens, self.loss, entropy)
        return logprobs, result if fused is None else LossResult(fused.total, result.figures)

    @property
    def _refers_back(self) -> bool:
        """Whether the ratios of tokens that older weights sampled refer to what the engine sampled with, the only
        record of those weights. An importance cap corrects them in its own way; `reinforce` has no ratios."""
        return self.loss.importance_cap is None and self.loss.objective.policy != "reinforce"

    def _recomputed(self, minibatches: Sequence[MiniBatch], groups: Sequence[Group]) -> list[MiniBatch]:
        """With what ratios refer to, where that is not the policy before the only update. A meeting, of ranks with the
        same settings."""
        is_new = Counter(one.version == self.version for group in groups for one in group.trajectories)
        samples = self.ranks.total({"new": is_new[True], "old": is_new[False]})
        if len(minibatches) * self.update.epochs == 1 and not (self._refers_back and samples["old"]):
            return list(minibatches)
        if self._refers_back and not samples["new"]:
            return [replace(one, old=self._as_sampled(one)) for one in minibatches]
        return [replace(one, old=self._old(one)) for one in minibatches]

    def _old(self, minibatch: MiniBatch) -> tuple[Tensor, ...]:
        """What ratios refer to: log-probabilities of the weights that sampled, of the present ones computed again."""
        now = self._logprobs(self.policy, minibatch)
        if not self._refers_back:
            return now
        triples = zip(minibatch.batches, now, self._as_sampled(minibatch), strict=True)
        return tuple(
            torch.where((batch.versions == self.version).to(new.device), new, old) for batch, new, old in triples
        )

    def _as_sampled(self, minibatch: MiniBatch) -> tuple[Tensor, ...]:
        return tuple(batch.rollout.to(self.policy.model.device) for batch in minibatch.batches)

    def _logprobs(self, policy: Policy, minibatch: MiniBatch) -> tuple[Tensor, ...]:
        """Of each micro-batch's trainable tokens."""
        device = policy.model.device
        return tuple(_without_gradients(policy, batch.to(device)) for batch in minibatch.batches)

    def _update(self, minibatch: MiniBatch, rate: float, figures: StepFigures, sampled_by: int | None) -> None:
        loss = self.ranks.sum(self.backward(minibatch, figures, sampled_by))
        if math.isfinite(loss):
            norm = self.optimizer.step(rate)
        else:
            norm = math.nan
            self.optimizer.drop_gradients()
        self.version += 1
        figures.add_update(loss, norm)
        if math.isfinite(norm):
            self.skipped = 0
            return
        self.skipped += 1
        if self.skipped >= self.update.max_skipped:
            raise TrainingDiverged(
                f"{self.skipped} updates in a row had no finite loss or gradient; the last checkpoint is intact. "
                "Lower update.learning_rate, or look at the rewards and log-probabilities of the last step"
            )


@torch.no_grad()
def _without_gradients(policy: Policy, batch: MicroBatch) -> Tensor:
    return policy.logprobs(batch)[0]
