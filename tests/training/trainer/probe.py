"""What a run's learner finds on a step's groups, without an update."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from vtengine_training.grpo.loss import Tokens, grpo_loss
from vtengine_training.grpo.weights import token_weights
from vtengine_training.trainer.figures import StepFigures
from vtengine_training.trainer.loop import Run
from vtengine_training.trainer.policy import BANNED
from vtengine_training.trainer.step import Learner
from vtengine_training.trainer.trajectory import Group

from vtengine.model import PackedCausal

Found = tuple[float, dict[str, torch.Tensor]]
"""Loss, and gradients by name."""


def collect(run: Run) -> list[Group]:
    """The first step's groups, with their pixels."""
    return asyncio.run(run.parts.collector.collect(1)).groups


def probe(run: Run, **changes: object) -> Learner:
    """The learner with other settings of its [update], over weights that have no gradients yet."""
    learner = run.parts.learner
    update = replace(run.config.update, **changes)
    policy = replace(learner.policy, chunk=update.logits_chunk, fused=update.logits == "fused")
    for parameter in policy.model.parameters():
        parameter.grad = None
    return Learner(
        policy, learner.reference, learner.optimizer, learner.loss, update, learner.cutter.constant_length, run.ranks
    )


def gradients(run: Run, groups: Sequence[Group], **changes: object) -> Found:
    """Of one mini-batch."""
    learner = probe(run, **changes)
    loss = learner.backward(learner.cutter.whole(groups), StepFigures())
    named = learner.policy.model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


def same(first: Found, second: Found) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-5, abs=1e-7)
    assert first[1].keys() == second[1].keys()
    for name, expected in second[1].items():
        torch.testing.assert_close(first[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def plain(one: Run, groups: Sequence[Group]) -> Found:
    """Each sequence alone, full logits, its images encoded for it, one loss written out."""
    learner, model = one.parts.learner, one.parts.model
    for parameter in model.parameters():
        parameter.grad = None
    members = [(g, t) for g, group in enumerate(groups) for t in group.trajectories]
    lengths = [t.num_trainable for _, t in members]
    weights = token_weights(lengths, [g for g, _ in members], learner.loss.objective.aggregation, 6)
    total = torch.zeros(())
    for (_, t), weight in zip(members, weights, strict=True):
        ids = torch.from_numpy(t.token_ids)
        features = torch.cat([model.visual(s.image.pixel_values, [s.image.grid_thw]) for s in t.images])
        hidden = model.decode(model.embed(ids, features), t.positions, PackedCausal([0, len(ids)]))
        logits = model.logits(hidden).clone()
        logits[:, list(learner.policy.banned)] = BANNED
        scores = logits.log_softmax(-1)
        trainable = torch.from_numpy(t.trainable)
        at = trainable.nonzero().view(-1)
        logprobs = scores[at - 1, ids[at]]
        ones = torch.ones_like(logprobs)
        rollout = torch.from_numpy(t.logprobs)[trainable]
        tokens = Tokens(rollout, rollout, ones * t.advantage, ones * weight, torch.zeros_like(at), 1)
        entropy = -(scores[at - 1].exp() * logits[at - 1]).sum(1) + logits[at - 1].logsumexp(1)
        total = total + grpo_loss(logprobs, tokens, learner.loss, entropy).total
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def nearly_equal(saved: Found, plain: Found) -> None:
    """Loss and gradients to 1e-6."""
    (loss, expected), whole = plain, torch.stack([exact.norm() for exact in plain[1].values()]).norm()
    assert saved[0] == pytest.approx(loss, rel=1e-6, abs=1e-7)
    assert saved[1].keys() == expected.keys()
    errors = {name: (saved[1][name] - exact).norm() for name, exact in expected.items()}
    assert torch.stack(list(errors.values())).norm() <= 2e-6 * whole  # each side rounds by 1e-6
    for name, exact in expected.items():
        assert errors[name] <= 5e-6 * exact.norm() + 1e-9, name
