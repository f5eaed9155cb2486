"""Rollout metrics from plain facts per sample; names as in the log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vtengine_training.rewards.base import CORRECT_FROM

Facts = Mapping[str, float]
"""One sample: reward, accuracy, format, penalty, upscaled, visual_tokens, visual_tokens_full, response_length, turns,
answered, truncated; needs_high where the example is labelled."""


def rollout_metrics(groups: Sequence[Sequence[Facts]]) -> dict[str, float]:
    """Means over all samples, and the spread inside groups. `upscale/precision`: of the upscaled samples, the share
    whose example is labelled as needing it; `upscale/recall`: of those that need it, the share upscaled."""
    samples = [facts for group in groups for facts in group]
    if not samples:
        return {}
    rewards = [facts["reward"] for facts in samples]
    found = {
        "reward/mean": _mean(rewards),
        "reward/std": _mean([_deviation([facts["reward"] for facts in group]) for group in groups]),
        "reward/min": min(rewards),
        "reward/max": max(rewards),
        "response_length/mean": _mean([facts["response_length"] for facts in samples]),
        "response_length/max": max(facts["response_length"] for facts in samples),
        "upscale/ratio": _mean([facts["upscaled"] for facts in samples]),
        "visual_tokens/per_question": _mean([facts["visual_tokens"] for facts in samples]),
        "turns/mean": _mean([facts["turns"] for facts in samples]),
        "groups/solve_all": _mean(
            [float(all(facts["accuracy"] >= CORRECT_FROM for facts in group)) for group in groups]
        ),
        "groups/solve_none": _mean(
            [float(all(facts["accuracy"] < CORRECT_FROM for facts in group)) for group in groups]
        ),
    }
    for name in ("accuracy", "format", "penalty"):
        found[f"reward/{name}"] = _mean([facts[name] for facts in samples])
    for name in ("answered", "truncated"):
        found[f"status/{name}"] = _mean([facts[name] for facts in samples])
    full = sum(facts["visual_tokens_full"] for facts in samples)
    if full:
        found["visual_tokens/kept_ratio"] = sum(facts["visual_tokens"] for facts in samples) / full
    return found | _by_action(samples) | _by_label(samples)


def _by_action(samples: Sequence[Facts]) -> dict[str, float]:
    found = {}
    for name, wanted in (("direct", 0.0), ("upscaled", 1.0)):
        part = [facts["accuracy"] for facts in samples if facts["upscaled"] == wanted]
        if part:
            found[f"upscale/accuracy_{name}"] = _mean(part)
    return found


def _by_label(samples: Sequence[Facts]) -> dict[str, float]:
    labelled = [facts for facts in samples if "needs_high" in facts]
    found = {}
    upscaled = [facts["needs_high"] for facts in labelled if facts["upscaled"]]
    if upscaled:
        found["upscale/precision"] = _mean(upscaled)
    for name, wanted in (("upscale/recall", 1.0), ("upscale/needless", 0.0)):
        part = [facts["upscaled"] for facts in labelled if facts["needs_high"] == wanted]
        if part:
            found[name] = _mean(part)
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(_mean([(value - mean) ** 2 for value in values]))
