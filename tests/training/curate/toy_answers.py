"""A reward by dotted path that knows which view a question needs."""

from __future__ import annotations


def by_id(episode, example) -> float:
    """q0, q4: always right. q1: at the high view. q2: never. q3: half of the time."""
    is_high = episode.visual_tokens == episode.visual_tokens_full
    if example.id == "q3":
        by_id.asked += 1
        return float(by_id.asked % 2)
    return float({"q0": True, "q1": is_high, "q2": False, "q4": True}[example.id])


by_id.asked = 0  # type: ignore[attr-defined]


def breaks_at_q2(episode, example) -> float:
    if example.id == "q2":
        raise RuntimeError("boom")
    return by_id(episode, example)


def always_breaks(episode, example) -> float:
    raise RuntimeError("boom")
