"""What is said of a sample."""

from __future__ import annotations

import pytest
from vtengine_training.rewards.base import Score
from vtengine_training.trainer.samples import sample_facts

from tests.training.rewards.episodes import direct, example


@pytest.mark.parametrize(
    ("label", "found"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), ("yes", None), (None, None), ([], None)]
)
def test_a_label_is_a_truth_value_or_0_or_1(label, found) -> None:
    facts = sample_facts(direct("4"), Score(1.0, 0.5), 1.4, example("4", needs_high=label))
    assert facts.get("needs_high") == found and facts["penalty"] == pytest.approx(0.1)
