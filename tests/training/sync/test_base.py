"""What is published: the learner's tensors, by the names of released checkpoints."""

from __future__ import annotations

import asyncio

import torch
from vtengine_training.sync.base import weights_of
from vtengine_training.sync.colocated import SharedParameters

from tests.engine.tiny import PAD, Letters, image, prompt, request, tiny_model
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.model import hf_tensors


def test_all_tensors_and_only_the_trained_ones():
    model = tiny_model()
    assert {name for name, _ in weights_of(model)()} == set(hf_tensors(model))
    model.visual.requires_grad_(False)
    with torch.no_grad():
        published = dict(weights_of(model, trained_only=True)())
    assert set(published) == {name for name in hf_tensors(model) if not name.startswith("visual.")}
    for name, tensor in published.items():
        assert tensor.data_ptr() == hf_tensors(model)[name].data_ptr() and not tensor.requires_grad


def test_shared_parameters_only_drop_what_was_computed_with_the_old_ones():
    model, picture = tiny_model(), image(1)
    ask = request("a", prompt(1, 9, [picture]), [picture], max_new_tokens=3)

    async def main():
        engine = EmbeddedEngine(model, Letters(), EngineConfig(page_size=1, num_pages=100, max_batch_tokens=64))
        try:
            before = await engine.generate(ask)
            with torch.no_grad():
                model.visual.merger.fc2.weight.mul_(-3)
            await SharedParameters(engine).publish(4)
            return before, await engine.generate(ask)
        finally:
            await engine.close()

    before, after = asyncio.run(main())
    assert PAD in ask.token_ids and after.images_encoded == (True,) and after.cached_tokens == 0
    assert (before.weight_version, after.weight_version) == (0, 4) and before.logprobs != after.logprobs
