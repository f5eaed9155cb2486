"""Engines for processes in tests: named to `EngineProcess` as "tests.engine.processes.engines:NAME"."""

from __future__ import annotations

import asyncio
import os
import time

from tests.engine.tiny import PAD, Letters, tiny_model
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.engine.processes import DataParallel, EngineProcess
from vtengine.engine.scripted import ScriptedBackend

ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def tiny(seed=0):
    config = EngineConfig(page_size=1, num_pages=8000, max_batch_tokens=64, max_running=8)
    return EmbeddedEngine(tiny_model(seed).requires_grad_(False), Letters(), config)


def loading(seconds):
    time.sleep(seconds)
    return fragile()


def with_a_child(seconds):
    os.system(f"sleep {seconds} &")
    return fragile()


def refusing():
    raise ValueError("folder: holds no model; give another")


class Fragile(ScriptedBackend):
    """Ends its process over a prompt that begins with 66, closes over one that begins with 67."""

    is_closed = False

    async def generate(self, request, on_tokens=None):
        if request.token_ids[0] == 66:
            os._exit(9)
        if request.token_ids[0] == 67:
            self.is_closed = True
        return await super().generate(request, on_tokens)

    def _next_reply(self, request):
        from vtengine.engine.base import BackendFailed

        return BackendFailed("the engine is closed") if self.is_closed else super()._next_reply(request)


def fragile(token_s=0.0):
    return Fragile(Letters(), lambda request: "abcdefghijklmnop", image_token_id=PAD, token_s=token_s)


def process(name, index=0, **options):
    return EngineProcess(f"{__name__}:{name}", options, f"{index} (test)", ENVIRONMENT)


def several(name, count=2, **options):
    return DataParallel(lambda index: process(name, index, **options), count, PAD)


def run(backend, function, seconds=60):
    """What an async function of the backend returns; closes it."""

    async def main():
        try:
            return await asyncio.wait_for(function(backend), seconds)
        finally:
            await backend.close()

    return asyncio.run(main())
