"""The backends that must conform. To join: a name and a function that makes one for a test.

With VTENGINE_CONFORMANCE=sglang_http or sglang_engine a real SGLang is what is tested: see tests/engine/sglang/real.py.
"""

from __future__ import annotations

import os

from tests.engine.tiny import PAD, Letters, tiny_model
from vtengine.engine.scripted import ScriptedBackend


def scripted():
    return ScriptedBackend(Letters(), lambda request: "abcdefghijklmnop", image_token_id=PAD)


def embedded():
    from vtengine.engine.embedded import EmbeddedEngine, EngineConfig

    config = EngineConfig(page_size=1, num_pages=400, max_batch_tokens=64, max_running=8)
    return EmbeddedEngine(tiny_model(), Letters(), config)


def own_process():
    from tests.engine.processes.engines import process

    return process("tiny")


def sglang_fake():
    """The HTTP backend and a server without a model."""
    from tests.engine.sglang.backends import over_fake_server

    return over_fake_server()


def sglang_real():
    from tests.engine.sglang.real import shared_backend

    return shared_backend(REAL)


REAL = os.environ.get("VTENGINE_CONFORMANCE", "")
ALWAYS = {"scripted": scripted, "embedded": embedded, "own_process": own_process, "sglang_fake": sglang_fake}
BACKENDS = {REAL: sglang_real} if REAL else ALWAYS
SHARES_IN_FLIGHT = not REAL
"""Requests that run at the same time share their prefix (SGLang: once one of them has been prefilled)."""
