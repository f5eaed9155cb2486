"""Alarms ring when they should, once; costs are those of the model."""

from __future__ import annotations

import pytest
from vtengine_training.trainer.alarms import WINDOW, Alarms
from vtengine_training.trainer.cost import ModelCost

from vtengine.model import ModelConfig, load_model


def ring(rows):
    alarms = Alarms()
    return [alarms.check(row) for row in rows]


@pytest.mark.parametrize(("ratio", "word"), [(0.0, "near 0"), (1.0, "near 1")])
def test_collapse_rings_once_after_a_whole_window(ratio, word) -> None:
    said = ring([{"upscale/ratio": ratio}] * (WINDOW + 5))
    assert [index for index, texts in enumerate(said) if texts] == [WINDOW - 1]
    assert word in said[WINDOW - 1][0]


def test_healthy_runs_are_silent() -> None:
    row = {"upscale/ratio": 0.4, "groups/zero_spread_ratio": 0.5, "groups/used": 8.0, "mismatch/abs_diff": 0.02}
    assert not any(ring([row] * 30))


def test_it_rings_again_after_it_was_quiet() -> None:
    said = ring(
        [{"updates/skipped": 1.0}, {"updates/skipped": 1.0}, {"updates/skipped": 0.0}, {"updates/skipped": 1.0}]
    )
    assert [bool(texts) for texts in said] == [True, False, False, True]


def test_drift_of_the_mismatch() -> None:
    assert any(
        "drift" in text for texts in ring([{"mismatch/abs_diff": 0.01 * k} for k in range(20)]) for text in texts
    )
    assert not any(ring([{"mismatch/abs_diff": 1e-7 * k} for k in range(20)]))


def test_costs(tiny_folder) -> None:
    config = ModelConfig.from_json(tiny_folder / "config.json")
    cost = ModelCost.of(config)
    model = load_model(tiny_folder)
    assert cost.total == sum(p.numel() for p in model.parameters())
    assert cost.text + cost.vision + cost.head + config.text.hidden_size == cost.total
    assert cost.training_flops(10, 0, 0) == 60 * cost.text
    assert cost.training_flops(0, 0, 10, train_vision=False) == 20 * cost.vision
    assert cost.training_bytes(4, False) == 16 * cost.total
    assert cost.training_bytes(4, True) == 20 * cost.total
    assert cost.training_bytes(2, True, ranks=4) == 2 * cost.total + -(-18 * cost.total // 4)
