"""Servers on loopback ports, stopped at the end of the test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.server.running import Replies, Running, WatchedScript, byte_tokenizer, make_setting, running, two_turns
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.server.config import ServerLimits
from vtengine.server.keys import ApiKeys


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def serve(tokenizer: Tokenizer) -> Iterator[Callable[..., Running]]:
    """serve(replies, limits=ServerLimits(...), keys=[...], slow=seconds per token, profile=..., protocol limits...).

    held: the engine answers nothing before `backend.released.set()`.
    """
    with contextlib.ExitStack() as stack:

        def start(
            replies: Replies = two_turns, *, limits: ServerLimits | None = None, keys: Sequence[str] = (),
            slow: float = 0.0, delay_s: float = 0.0, held: bool = False, **more: Any,
        ) -> Running:  # fmt: skip
            backend = WatchedScript(tokenizer, replies, delay_s=delay_s, token_s=slow)
            if held:
                backend.released.clear()
            limits = replace(limits or ServerLimits(), drain_s=1)
            return stack.enter_context(running(make_setting(backend, tokenizer, **more), limits, ApiKeys(keys)))

        yield start
