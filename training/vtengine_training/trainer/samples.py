"""What is said of one sample: figures for the metrics, and a record for `vtengine view`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtengine.rollout.episode import Episode
from vtengine.rollout.records import Row, episode_row
from vtengine.vision.source import is_url
from vtengine_training.data.examples import Example
from vtengine_training.rewards.base import CORRECT_FROM, Score


def sample_facts(episode: Episode, score: Score, reward: float, example: Example) -> dict[str, float]:
    """The figures of one sample that metrics are made of."""
    accuracy = score.accuracy or 0.0
    facts = {
        "reward": reward,
        "accuracy": accuracy,
        "format": score.format,
        "penalty": accuracy + score.format - reward,
        "upscaled": float(episode.is_upscaled),
        "visual_tokens": float(episode.visual_tokens),
        "visual_tokens_full": float(episode.visual_tokens_full),
        "response_length": float(sum(len(turn.completion.token_ids) for turn in episode.turns)),
        "turns": float(len(episode.turns)),
        "answered": float(episode.status == "answered"),
        "truncated": float(episode.status == "truncated"),
    }
    if example.fields.get("needs_high") in (0, 1):  # True and False are among them
        facts["needs_high"] = float(example.fields["needs_high"])
    return facts


def sample_row(
    episode: Episode,
    index: int,
    example: Example,
    step: int,
    draw: int,
    facts: Mapping[str, float],
    advantage: float,
    by_turn: Sequence[float] = (),
) -> Row:
    """A record as `vtengine generate` writes them, with what training adds. by_turn: advantages, where each turn has
    its own."""
    row = episode_row(episode, index)
    if by_turn:
        row["turns"] = [turn | {"advantage": own} for turn, own in zip(row["turns"], by_turn, strict=True)]
    own: dict[str, Any] = {"question": example.question, "image": example.image, "expected": list(example.answers)}
    own |= {"correct": facts["accuracy"] >= CORRECT_FROM, "step": step, "draw": draw, "advantage": advantage}
    own |= {name: facts[name] for name in ("reward", "accuracy", "format", "penalty")}
    if not is_url(example.image):
        own["image_path"] = str((Path(example.root) / example.image).resolve())
    return row | own
