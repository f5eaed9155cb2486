"""A step's figures over micro-batches, updates and ranks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from vtengine_training.trainer.figures import StepFigures, read
from vtengine_training.trainer.ranks import Ranks


def test_means_are_over_tokens_of_all_ranks_and_maxima_stay_maxima() -> None:
    other = {"tokens": 3.0, "entropy": 6.0, "mismatch/tokens": 1.0, "mismatch/abs_diff": 0.5, "mismatch/max": 0.5}
    figures = StepFigures()
    figures.add({"tokens": 1.0, "entropy": 2.0, "tokens/packed": 10})
    figures.add({"tokens": 1.0, "entropy": 2.0, "mismatch/tokens": 1.0, "mismatch/abs_diff": 0.1, "mismatch/max": 0.1})
    figures.add_update(2.0, 3.0)
    figures.add_update(4.0, 5.0)
    figures.add_update(0.0, math.nan)
    found = figures.means(SimpleNamespace(gather=lambda own: [own, other]))
    assert found == {
        "tokens/trained": 5,
        "tokens/packed": 10,
        "entropy": pytest.approx(2.0),
        "mismatch/abs_diff": pytest.approx(0.3),
        "mismatch/max": 0.5,
        "updates/skipped": 1,
        "grad_norm": 4,
        "grad_norm/max": 5,
        "loss": 3,
    }


def test_nothing_is_said_of_what_was_not_compared() -> None:
    figures = StepFigures()
    figures.add({"tokens": 2.0, "mismatch/tokens": 0.0, "mismatch/kl": 0.0, "mismatch/max": 0.0})
    assert not [name for name in figures.means(Ranks()) if name.startswith("mismatch")]


def test_scalars_of_any_dtype_are_read_together() -> None:
    assert read({"a": torch.tensor(3), "b": torch.tensor(0.5, requires_grad=True)}) == {"a": 3.0, "b": 0.5}
