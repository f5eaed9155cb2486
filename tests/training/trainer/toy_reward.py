"""Reward functions for configs of the tests, by dotted path."""

from __future__ import annotations

import time


def low_bytes(episode, example) -> float:
    """The share of sampled ids below 64."""
    ids = [token for turn in episode.turns for token in turn.completion.token_ids]
    return sum(token < 64 for token in ids) / len(ids)


def slow_low_bytes(episode, example) -> float:
    """The same, and long enough for a signal to come in between."""
    time.sleep(0.02)
    return low_bytes(episode, example)


def broken(episode, example) -> float:
    raise RuntimeError("broken")
