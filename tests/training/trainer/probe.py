"""What a run's learner finds on a step's groups, without an update."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from vtengine_training.trainer.loop import Run
from vtengine_training.trainer.step import Learner, _Sums
from vtengine_training.trainer.trajectory import Group

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
        policy, learner.reference, learner.optimizer, learner.loss, update, learner.constant_length, run.ranks
    )


def gradients(run: Run, groups: Sequence[Group], **changes: object) -> Found:
    """Of one mini-batch."""
    learner = probe(run, **changes)
    loss = learner.backward(learner.build(groups), None, _Sums())
    named = learner.policy.model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


def same(first: Found, second: Found) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-5, abs=1e-7)
    assert first[1].keys() == second[1].keys()
    for name, expected in second[1].items():
        torch.testing.assert_close(first[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)
