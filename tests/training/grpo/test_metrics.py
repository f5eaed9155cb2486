"""Metrics of a rollout by hand."""

from __future__ import annotations

import pytest
from vtengine_training.grpo.metrics import rollout_metrics


def facts(**changes):
    base = {"reward": 1.0, "accuracy": 1.0, "format": 0.5, "penalty": 0.5, "upscaled": 0.0, "visual_tokens": 10.0}
    base |= {"visual_tokens_full": 40.0, "response_length": 5.0, "turns": 1.0, "answered": 1.0, "truncated": 0.0}
    return base | changes


def test_by_hand() -> None:
    groups = [
        [facts(needs_high=1.0, upscaled=1.0, visual_tokens=50.0), facts(needs_high=1.0, reward=0.0, accuracy=0.0)],
        [facts(needs_high=0.0), facts(needs_high=0.0, upscaled=1.0, visual_tokens=50.0, reward=0.5)],
    ]
    found = rollout_metrics(groups)
    assert found["reward/mean"] == pytest.approx(0.625)
    assert found["reward/std"] == pytest.approx((0.5 + 0.25) / 2)
    assert found["reward/accuracy"] == 0.75
    assert found["upscale/ratio"] == 0.5
    assert found["upscale/precision"] == 0.5
    assert found["upscale/recall"] == 0.5 and found["upscale/needless"] == 0.5
    assert found["upscale/accuracy_direct"] == 0.5 and found["upscale/accuracy_upscaled"] == 1.0
    assert found["visual_tokens/per_question"] == 30
    assert found["visual_tokens/kept_ratio"] == 0.75
    assert found["groups/solve_all"] == 0.5 and found["groups/solve_none"] == 0.0


def test_a_part_of_an_answer_is_not_solved() -> None:
    found = rollout_metrics([[facts(accuracy=0.4), facts(accuracy=0.1)], [facts(accuracy=0.6), facts()]])
    assert found["groups/solve_all"] == 0.5 and found["groups/solve_none"] == 0.5


def test_nothing_makes_no_metrics() -> None:
    assert rollout_metrics([]) == {}


def test_unlabelled_examples_have_no_precision() -> None:
    found = rollout_metrics([[facts(), facts()]])
    assert not {"upscale/precision", "upscale/recall", "upscale/accuracy_upscaled"} & found.keys()
