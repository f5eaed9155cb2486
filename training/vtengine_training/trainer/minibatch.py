"""A step's groups, of all ranks, cut into mini-batches, one optimiser update each, and these into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from vtengine_training.grpo.config import Aggregation
from vtengine_training.grpo.weights import token_weights
from vtengine_training.trainer.balance import balanced
from vtengine_training.trainer.batch import MicroBatch, build_batch, plan_micro_batches
from vtengine_training.trainer.config import UpdateConfig
from vtengine_training.trainer.padding import needs_padding, padding
from vtengine_training.trainer.policy import Policy
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.trajectory import Group, Trajectory

Outline = list[tuple[int, list[int]]]
"""(number of the draw, trainable tokens of each sibling) of every group, on all ranks, in order."""
Member = tuple[int, int]
"""(number of the draw, sibling)."""


@dataclass(frozen=True, eq=False)
class MiniBatch:
    """This rank's micro-batches, on the CPU; those from num_own on are padding without effect.

    old, reference: log-probabilities of each micro-batch's tokens, on the model's device, if they were computed before
    the first update.
    """

    batches: tuple[MicroBatch, ...]
    num_own: int
    old: tuple[Tensor, ...] | None = None
    reference: tuple[Tensor, ...] | None = None


class Cutter:
    """Cuts the groups of all ranks in the order of their draws, as equally as can be, and sets the weights of tokens
    over all of the step: loss and gradients are the same for any number of ranks, and a sample counts as much in a
    mini-batch with one group fewer as in the others.
    """

    def __init__(
        self, policy: Policy, update: UpdateConfig, aggregation: Aggregation, constant_length: int, ranks: Ranks
    ) -> None:
        self.policy, self.update, self.ranks = policy, update, ranks
        self.aggregation: Aggregation = aggregation
        self.constant_length = constant_length

    def cut(self, groups: Sequence[Group]) -> list[MiniBatch]:
        """groups: this rank's, of one step. A meeting: a rank may learn from others' groups."""
        outline = self._outline(groups)
        return self._cut(groups, outline, equal_parts(outline, self.update.minibatch_prompts))

    def whole(self, groups: Sequence[Group]) -> MiniBatch:
        """The groups of all ranks as one mini-batch."""
        outline = self._outline(groups)
        return self._cut(groups, outline, [outline])[0]

    def _outline(self, groups: Sequence[Group]) -> Outline:
        own = [(group.draw, [one.num_trainable for one in group.trajectories]) for group in groups]
        return sorted((draw, lengths) for part in self.ranks.gather(own) for draw, lengths in part)

    def _cut(self, groups: Sequence[Group], outline: Outline, parts: Sequence[Outline]) -> list[MiniBatch]:
        weights = self._weights(outline, len(parts))
        draws = [{draw for draw, _ in part} for part in parts]
        own = balanced(groups, draws, self.ranks, self.update.share_prefix)
        return [self._minibatch([group for group in own if group.draw in part], weights) for part in draws]

    def _weights(self, outline: Outline, count: int) -> dict[Member, float]:
        """The weight of each token of each sequence in one of `count` mini-batches: `count` times that in all of them
        together."""
        members = [(draw, t) for draw, siblings in outline for t in range(len(siblings))]
        lengths = [length for _, siblings in outline for length in siblings]
        weights = token_weights(lengths, [draw for draw, _ in members], self.aggregation, self.constant_length)
        return {member: count * weight for member, weight in zip(members, weights, strict=True)}

    def _minibatch(self, groups: Sequence[Group], weights: Mapping[Member, float]) -> MiniBatch:
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


def equal_parts(outline: Outline, most: int | None) -> list[Outline]:
    """In order, of at most `most` groups each (None: one part), their sizes differing by one at most."""
    total = len(outline)
    count = math.ceil(total / (most or max(1, total)))
    return [outline[part * total // count : (part + 1) * total // count] for part in range(count)]
