"""Learning rates at the steps where a mistake shows: first, last, and at the end of the warm-up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vtengine_training.trainer.config import UpdateConfig
from vtengine_training.trainer.schedule import learning_rate
from vtengine_training.trainer.trajectory import Trajectory


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)]
)
def test_rates(schedule, middle, last) -> None:
    update = UpdateConfig(
        learning_rate=1.0, warmup=2, schedule=schedule, final_rate=0.0 if schedule == "constant" else 0.1
    )
    rates = [learning_rate(update, step, 12) for step in range(12)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[6] == pytest.approx(middle) and rates[-1] == pytest.approx(last)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_bad_rates() -> None:
    with pytest.raises(ValueError, match="from 0 to learning_rate"):
        UpdateConfig(learning_rate=1.0, final_rate=2.0)
    with pytest.raises(ValueError, match="schedule"):
        UpdateConfig(learning_rate=1.0, final_rate=0.5)


def test_a_turn_is_a_run_of_trainable_tokens() -> None:
    trainable = np.array([False, True, True, False, False, True, False])
    one = Trajectory(np.arange(7), torch.zeros(3, 7), trainable, np.zeros(7, dtype=np.float32), (), 0, 0.5, {})
    assert one.token_advantages.tolist() == [0.5, 0.5, 0.5]
    two = Trajectory(**{**vars(one), "turn_advantages": (1.0, -2.0)})
    assert two.token_advantages.tolist() == [1.0, 1.0, -2.0]
