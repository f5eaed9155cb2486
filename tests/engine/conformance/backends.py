"""The backends that must conform. To join: a name and a function that makes one for a test."""

from __future__ import annotations

from tests.engine.tiny import PAD, Letters, tiny_model
from vtengine.engine.scripted import ScriptedBackend


def scripted():
    return ScriptedBackend(Letters(), lambda request: "abcdefghijklmnop", image_token_id=PAD)


def embedded():
    from vtengine.engine.embedded import EmbeddedEngine, EngineConfig

    config = EngineConfig(page_size=1, num_pages=400, max_batch_tokens=64, max_running=8)
    return EmbeddedEngine(tiny_model(), Letters(), config)


BACKENDS = {"scripted": scripted, "embedded": embedded}
