"""Weights in pieces: what comes out of the parts is the whole model, in order, a part at a time."""

from __future__ import annotations

import asyncio
from unittest.mock import AsyncMock

import pytest
import torch
from vtengine_training.sync.base import weights_of
from vtengine_training.sync.gathered import CopiedWeights, WeightParts

from tests.engine.tiny import tiny_model


@pytest.mark.parametrize("part_bytes", [1, 5_000, 10**9])
@pytest.mark.parametrize("frozen", [False, True])
def test_parts_are_the_trained_weights_of_checkpoints(part_bytes, frozen):
    model = tiny_model()
    model.visual.requires_grad_(not frozen)
    expected = dict(weights_of(model, trained_only=True)())
    parts, asked = WeightParts(model, torch.float32, part_bytes), []

    def gather(number):
        asked.append((number, [tensor.numel() * 4 for tensor in parts.gather(number)]))
        return parts.gather(number)

    stream = parts.named(gather)
    first, tensor = next(stream)
    assert len(asked) == 1, "the second part only once it is needed"
    found = {first: tensor} | dict(stream)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], wanted) for name, wanted in expected.items())
    assert [number for number, _ in asked] == list(range(len(asked)))
    assert all(len(sizes) == 1 or sum(sizes) <= part_bytes for _, sizes in asked)


def test_every_gathering_of_the_same_model_is_new():
    model = tiny_model()
    parts = WeightParts(model, torch.bfloat16, 10_000)
    before = {name: tensor.clone() for name, tensor in parts.named(parts.gather)}
    with torch.no_grad():
        model.norm.weight.add_(1)
    after = dict(parts.named(parts.gather))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"model.norm.weight"}
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


def test_a_version_is_copied_once_and_published_whenever_it_is_asked_for():
    learned, whole, onward = tiny_model(), tiny_model(), AsyncMock()
    copied = CopiedWeights(onward, whole, WeightParts(learned, torch.float32))
    with torch.no_grad():
        learned.norm.weight.add_(1)
    for version, equal in ((0, False), (1, True)):  # a run begins with equal weights
        asyncio.run(copied.publish(version))
        assert torch.equal(whole.norm.weight, learned.norm.weight) == equal
    with torch.no_grad():
        whole.norm.weight.zero_()
    asyncio.run(copied.publish(1))
    assert not whole.norm.weight.any()
    assert [call.args for call in onward.publish.call_args_list] == [(0,), (1,), (1,)]
