"""One training step's learning: mini-batches of groups, micro-batches of tokens, one optimiser update each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vtengine_training.grpo.config import LossConfig
from vtengine_training.grpo.loss import LossResult, Tokens, grpo_loss, mismatch_figures
from vtengine_training.grpo.weights import token_weights
from vtengine_training.sft.optim import MasterAdamW
from vtengine_training.trainer.balance import balanced
from vtengine_training.trainer.batch import MicroBatch, build_batch, plan_micro_batches
from vtengine_training.trainer.config import UpdateConfig
from vtengine_training.trainer.objective import kernel_objective, kernel_tokens
from vtengine_training.trainer.padding import needs_padding, padding
from vtengine_training.trainer.policy import Policy
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.sharding import Sharded
from vtengine_training.trainer.trajectory import Group, Trajectory

Outline = list[tuple[int, list[int]]]
"""(number of the draw, trainable tokens of each sibling) of every group of a mini-batch, on all ranks, in order."""
Member = tuple[int, int]
"""(number of the draw, sibling)."""
MAXIMA = ("mismatch/max",)
"""Figures of which the largest counts; the others are sums over tokens."""


class TrainingDiverged(RuntimeError):
    """Too many updates in a row without finite gradients."""


@dataclass(frozen=True, eq=False)
class MiniBatch:
    """One optimiser update: this rank's micro-batches, on the CPU; those from num_own on are padding without effect."""

    batches: tuple[MicroBatch, ...]
    num_own: int


class Learner:
    """Turns groups into updates. `version` counts the updates made; `skipped` those in a row that were not finite.

    Each rank brings its own groups, and may learn from others'. Mini-batches are cut from those of all ranks in the
    order of their draws, as equal as can be, and the weights of the tokens are set over all of the step: loss and
    gradients are the same for any number of ranks, and a sample counts as much in a mini-batch with one group fewer as
    in the others.

    A micro-batch is on the model's device only while it is worked on.
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
        figures = sums.means(self.ranks)
        figures |= {"lr": rate, "updates": float(updates), "version": float(self.version)}
        return figures

    def _minibatches(self, groups: Sequence[Group]) -> Iterator[MiniBatch]:
        outline = self._outline(groups)
        yield from self._build(groups, outline, self._parts(outline))

    def _build(self, groups: Sequence[Group], outline: Outline, parts: Sequence[Outline]) -> Iterator[MiniBatch]:
        weights = self._weights(outline, len(parts))
        draws = [{draw for draw, _ in part} for part in parts]
        own = balanced(groups, draws, self.ranks, self.update.share_prefix)
        for part in draws:
            yield self._cut([group for group in own if group.draw in part], weights)

    def _outline(self, groups: Sequence[Group]) -> Outline:
        own = [(group.draw, [one.num_trainable for one in group.trajectories]) for group in groups]
        return sorted((draw, lengths) for part in self.ranks.gather(own) for draw, lengths in part)

    def _parts(self, outline: Outline) -> list[Outline]:
        """Cut into mini-batches of at most update.minibatch_prompts groups, whose sizes differ by one at most."""
        total = len(outline)
        count = math.ceil(total / (self.update.minibatch_prompts or max(1, total)))
        return [outline[part * total // count : (part + 1) * total // count] for part in range(count)]

    def _weights(self, outline: Outline, count: int) -> dict[Member, float]:
        """The weight of each token of each sequence in one of `count` mini-batches: `count` times that in all of them
        together."""
        members = [(draw, t) for draw, siblings in outline for t in range(len(siblings))]
        lengths = [length for _, siblings in outline for length in siblings]
        owners = [draw for draw, _ in members]
        weights = token_weights(lengths, owners, self.loss.objective.aggregation, self.constant_length)
        return {member: count * weight for member, weight in zip(members, weights, strict=True)}

    def build(self, groups: Sequence[Group]) -> MiniBatch:
        """The groups of all ranks as one mini-batch."""
        outline = self._outline(groups)
        return next(self._build(groups, outline, [outline]))

    def _cut(self, groups: Sequence[Group], weights: Mapping[Member, float]) -> MiniBatch:
        """This rank's groups of a mini-batch in micro-batches, as many as the rank with the most has."""
        batches = []
        update = self.update
        plan = plan_micro_batches([group.trajectories for group in groups], update.max_tokens, update.share_prefix)
        for members in plan:
            chosen: list[Trajectory] = [groups[g].trajectories[t] for g, t in members]
            own = [weights[groups[g].draw, t] for g, t in members]
            if not self.ranks.is_alone and needs_padding(chosen):
                chosen, own = [*chosen, self._padding], [*own, 0.0]
            batches.append(build_batch(chosen, own, update.share_images, update.share_prefix))
        missing = max(self.ranks.gather(len(batches))) - len(batches)
        empty = [build_batch([self._padding], [0.0])] * missing
        return MiniBatch((*batches, *empty), len(batches))

    @cached_property
    def _padding(self) -> Trajectory:
        return padding(self.policy)

    def backward(
        self, minibatch: MiniBatch, old: Sequence[Tensor] | None, sums: _Sums, sampled_by: int | None = None
    ) -> float:
        """Adds the mini-batch's gradients to the model's; returns its loss.

        sampled_by: the version whose samples are compared with the engine's log-probabilities; None = no comparison.
        """
        loss = 0.0
        for index, batch in enumerate(minibatch.batches):
            if isinstance(self.policy.enter, Sharded):
                self.policy.enter.sum_copies(index == len(minibatch.batches) - 1)
            counted = sums if index < minibatch.num_own else None
            loss += self._backward(batch, None if old is None else old[index], counted, sampled_by)
        return loss

    def _backward(self, batch: MicroBatch, old: Tensor | None, sums: _Sums | None, sampled_by: int | None) -> float:
        """`backward` of one micro-batch, which leaves the device with the return; sums: None for padding."""
        batch = batch.to(self.policy.model.device)
        logprobs, result = self._loss(batch, old)
        if sums is not None:
            if sampled_by is not None:
                seen = logprobs.detach() if old is None else old
                same = batch.versions == sampled_by
                sums.add(mismatch_figures(seen[same], batch.rollout[same]), int(same.sum()))
            sums.add(result.figures, int(result.figures["tokens"]))
            sums.work(batch)
        if not self.ranks.is_alone or torch.isfinite(result.total):  # the others wait in the backward pass
            result.total.backward()  # type: ignore[no-untyped-call]
        return float(result.total.detach())

    def _loss(self, batch: MicroBatch, old: Tensor | None) -> tuple[Tensor, LossResult]:
        """(log-probabilities, the batch's loss and figures); by the kernel where the policy is fused."""
        reference = None if self.reference is None else _without_gradients(self.reference, batch)
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

    def _frozen(self, batch: MicroBatch) -> Tensor:
        return _without_gradients(self.policy, batch.to(self.policy.model.device))

    def _update(
        self, minibatch: MiniBatch, old: Sequence[Tensor] | None, rate: float, sums: _Sums, sampled_by: int | None
    ) -> None:
        loss = self.ranks.sum(self.backward(minibatch, old, sums, sampled_by))
        if math.isfinite(loss):
            norm = self.optimizer.step(rate)
        else:
            norm = math.nan
            self.optimizer.drop_gradients()
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
            if not name.startswith("loss/"):
                self._put(name, value, tokens)

    def _put(self, name: str, value: float, count: int) -> None:
        if name in MAXIMA:
            self.totals[name], self.counts[name] = max(self.totals[name], value), 1
        else:
            self.totals[name] += value
            self.counts[name] += count

    def _merge(self, ranks: Ranks) -> None:
        if ranks.is_alone:
            return
        own = [dict(self.totals), dict(self.counts), self.num_packed, self.num_patches]
        self.totals, self.counts = defaultdict(float), defaultdict(int)
        self.num_packed = self.num_patches = 0
        for totals, counts, packed, patches in ranks.gather(own):
            for name, value in totals.items():
                self._put(name, value, counts.get(name, 0))
            self.num_packed += packed
            self.num_patches += patches

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

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Per-token means, and means over the updates; `tokens/*` and `patches/*` are sums. Of all ranks."""
        self._merge(ranks)
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
