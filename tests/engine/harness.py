"""Runs the embedded engine in a test, and compares it with a plain forward pass."""

from __future__ import annotations

import asyncio

import pytest

from tests.engine.tiny import Letters, cold_greedy, image, prompt, request, tiny_model
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig

MODEL = tiny_model().requires_grad_(False)  # as the command line serves it
TOLERANCE = 1e-4


def run(function, model=MODEL, **config):
    """Runs an async function of an engine; checks every book when it is done."""
    config = {"page_size": 4, "num_pages": 300, "max_batch_tokens": 64, "max_running": 8} | config

    async def main():
        engine = EmbeddedEngine(model, Letters(), EngineConfig(**config))
        try:
            result = await asyncio.wait_for(function(engine), 60)
            await settle(engine)
            engine.scheduler.check_integrity()
            engine.vision.check_integrity()
            return result
        finally:
            await engine.close()

    return asyncio.run(main())


async def settle(engine):
    while not engine.scheduler.idle:
        await asyncio.sleep(0.001)


def serve(requests, **config):
    return run(lambda engine: asyncio.gather(*map(engine.generate, requests)), **config)


def assert_cold(completion, ask, model=MODEL):
    ids, logprobs = cold_greedy(model, ask.token_ids, ask.images, len(completion.token_ids))
    assert completion.token_ids == ids
    assert completion.logprobs == pytest.approx(logprobs, abs=TOLERANCE)


def mixed_requests(count=6, **sampling):
    pictures = [image(1), image(2, h=6, w=6, width=1176), image(3, h=2, w=2)]
    return [
        request(f"r{k}", prompt(k, 6 + 5 * k, pictures[: k % 4]), pictures[: k % 4], **sampling) for k in range(count)
    ]
