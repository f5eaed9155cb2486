"""One training step's learning: mini-batches of groups, micro-batches of tokens, one optimiser update each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtengine_training.grpo.config import LossConfig
from vtengine_training.grpo.loss import LossResult, Tokens, grpo_loss, mismatch_figures
from vtengine_training.grpo.weights import token_weights
from vtengine_training.sft.optim import MasterAdamW
from vtengine_training.trainer.batch import MicroBatch, build_batch, plan_micro_batches
from vtengine_training.trainer.config import UpdateConfig
from vtengine_training.trainer.objective import kernel_objective, kernel_tokens
from vtengine_training.trainer.policy import Policy
from vtengine_training.trainer.trajectory import Group, Trajectory

MAXIMA = ("mismatch/max",)
"""Figures of which the largest counts; the others are sums over tokens."""


class TrainingDiverged(RuntimeError):
    """Too many updates in a row without finite gradients."""


@dataclass(frozen=True, eq=False)
class MiniBatch:
    """One optimiser update: micro-batches, with their trajectories' old log-probabilities if they are set."""

    batches: tuple[MicroBatch, ...]
    num_tokens: int


class Learner:
    """Turns groups into updates. `version` counts the updates made; `skipped` those in a row that were not finite."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        optimizer: MasterAdamW,
        loss: LossConfig,
        update: UpdateConfig,
        constant_length: int,
    ) -> None:
        if loss.kl_coef and reference is None:
            raise ValueError(f"loss.kl_coef = {loss.kl_coef}: needs a reference model")
        self.policy, self.reference, self.optimizer = policy, reference, optimizer
        self.loss, self.update = loss, update
        self.constant_length = update.constant_length or constant_length
        self.version = 0
        self.skipped = 0

    def learn(self, groups: Sequence[Group], rate: float) -> dict[str, float]:
        """Every update of one training step; returns the metrics, named as in the log.

        Raises TrainingDiverged after update.max_skipped updates in a row whose loss or gradients were not finite.
        """
        began = self.version
        minibatches = list(self._minibatches(groups))
        updates = len(minibatches) * self.update.epochs
        old: list[list[Tensor]] | None = None
        if self.loss.old_logprobs == "recompute" and updates > 1:
            old = [[self._frozen(batch) for batch in minibatch.batches] for minibatch in minibatches]
        sums = _Sums()
        for epoch in range(self.update.epochs):
            for index, minibatch in enumerate(minibatches):
                fresh = epoch == 0 and (index == 0 or old is not None)
                self._update(minibatch, None if old is None else old[index], rate, sums, began if fresh else None)
        figures = sums.means()
        figures |= {"lr": rate, "updates": float(updates), "version": float(self.version)}
        return figures

    def _minibatches(self, groups: Sequence[Group]) -> Iterator[MiniBatch]:
        size = self.update.minibatch_prompts or max(1, len(groups))
        for start in range(0, len(groups), size):
            yield self.build(groups[start : start + size])

    def build(self, groups: Sequence[Group]) -> MiniBatch:
        """Weights from the whole mini-batch, then its cut into micro-batches."""
        lengths = [one.num_trainable for group in groups for one in group.trajectories]
        owners = [index for index, group in enumerate(groups) for _ in group.trajectories]
        weights = token_weights(lengths, owners, self.loss.objective.aggregation, self.constant_length)
        place: dict[tuple[int, int], int] = {}
        for g, group in enumerate(groups):
            for t in range(len(group.trajectories)):
                place[g, t] = len(place)
        batches = []
        update = self.update
        plan = plan_micro_batches([group.trajectories for group in groups], update.max_tokens, update.share_prefix)
        for members in plan:
            chosen: list[Trajectory] = [groups[g].trajectories[t] for g, t in members]
            own = [weights[place[member]] for member in members]
            device = self.policy.model.device
            batches.append(build_batch(chosen, own, device, update.share_images, update.share_prefix))
        return MiniBatch(tuple(batches), sum(lengths))

    def backward(
        self, minibatch: MiniBatch, old: Sequence[Tensor] | None, sums: _Sums, sampled_by: int | None = None
    ) -> float:
        """Adds the mini-batch's gradients to the model's; returns its loss.

        sampled_by: the version whose samples are compared with the engine's log-probabilities; None = no comparison.
        """
        loss = 0.0
        for index, batch in enumerate(minibatch.batches):
            logprobs, result = self._loss(batch, None if old is None else old[index])
            if sampled_by is not None:
                seen = logprobs.detach() if old is None else old[index]
                same = batch.versions == sampled_by
                sums.add(mismatch_figures(seen[same], batch.rollout[same]), int(same.sum()))
            sums.add(result.figures, len(logprobs))
            sums.work(batch)
            if torch.isfinite(result.total):
                result.total.backward()  # type: ignore[no-untyped-call]
            loss += float(result.total.detach())
        return loss

    def _loss(self, batch: MicroBatch, old: Tensor | None) -> tuple[Tensor, LossResult]:
        """(log-probabilities, the batch's loss and figures); by the kernel where the policy is fused."""
        reference = None if self.reference is None else _without_gradients(self.reference, batch)
        fused = None
        if self.policy.fused:
            before = batch.rollout if self.loss.old_logprobs == "rollout" else old
            fused = self.policy.loss(batch, kernel_tokens(batch, before, reference), kernel_objective(self.loss))
            logprobs, entropy = fused.logprobs, fused.entropies
        else:
            logprobs, entropy = self.policy.logprobs(batch)
        tokens = Tokens(
            self._old(batch, old, logprobs),
            batch.rollout,
            batch.advantages,
            batch.weights,
            batch.sequences,
            batch.num_sequences,
            reference,
        )
        result = grpo_loss(logprobs, tokens, self.loss, entropy)
        return logprobs, result if fused is None else LossResult(fused.total, result.figures)

    def _old(self, batch: MicroBatch, old: Tensor | None, logprobs: Tensor) -> Tensor:
        if self.loss.old_logprobs == "rollout":
            return batch.rollout
        return logprobs.detach() if old is None else old

    def _frozen(self, batch: MicroBatch) -> Tensor:
        return _without_gradients(self.policy, batch)

    def _update(
        self, minibatch: MiniBatch, old: Sequence[Tensor] | None, rate: float, sums: _Sums, sampled_by: int | None
    ) -> None:
        loss = self.backward(minibatch, old, sums, sampled_by)
        if math.isfinite(loss):
            norm = self.optimizer.step(rate)
        else:
            norm = math.nan
            for parameter in self.optimizer.live.values():
                parameter.grad = None
        self.version += 1
        sums.update(loss, norm)
        if math.isfinite(norm):
            self.skipped = 0
            return
        self.skipped += 1
        if self.skipped >= self.update.max_skipped:
            raise TrainingDiverged(
                f"{self.skipped} updates in a row had no finite loss or gradient; the last checkpoint is intact. "
                "Lower update.learning_rate, or look at the rewards and log-probabilities of the last step"
            )


class _Sums:
    """Figures added up over micro-batches, and per update."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.norms: list[float] = []
        self.losses: list[float] = []
        self.num_skipped = self.num_packed = self.num_patches = 0

    def add(self, figures: dict[str, float], tokens: int) -> None:
        for name, value in figures.items():
            if name in MAXIMA:
                self.totals[name] = max(self.totals[name], value)
                self.counts[name] = 1
            elif not name.startswith("loss/"):
                self.totals[name] += value
                self.counts[name] += tokens

    def work(self, batch: MicroBatch) -> None:
        """What a forward and backward pass had to do."""
        self.num_packed += len(batch.token_ids)
        self.num_patches += 0 if batch.pixel_values is None else len(batch.pixel_values)

    def update(self, loss: float, norm: float) -> None:
        if math.isfinite(norm):
            self.norms.append(norm)
            self.losses.append(loss)
        else:
            self.num_skipped += 1

    def means(self) -> dict[str, float]:
        """Per-token means, and means over the updates; `tokens/*` and `patches/*` are sums."""
        found = {name: total / max(1, self.counts[name]) for name, total in self.totals.items() if name != "tokens"}
        found["tokens/trained"] = self.totals["tokens"]
        found["tokens/packed"] = float(self.num_packed)
        found["patches/encoded"] = float(self.num_patches)
        found["updates/skipped"] = float(self.num_skipped)
        if self.norms:
            found["grad_norm"] = sum(self.norms) / len(self.norms)
            found["grad_norm/max"] = max(self.norms)
            found["loss"] = sum(self.losses) / len(self.losses)
        return found


@torch.no_grad()
def _without_gradients(policy: Policy, batch: MicroBatch) -> Tensor:
    return policy.logprobs(batch)[0]
