"""Alarms ring when they should, once."""

from __future__ import annotations

import pytest
from vtengine_training.trainer.alarms import WINDOW, Alarms


def ring(rows):
    alarms = Alarms()
    return [alarms.check(row) for row in rows]


@pytest.mark.parametrize(("ratio", "word"), [(0.0, "near 0"), (1.0, "near 1")])
def test_collapse_rings_once_after_a_whole_window(ratio, word) -> None:
    said = ring([{"upscale/ratio": ratio}] * (WINDOW + 5))
    assert [index for index, texts in enumerate(said) if texts] == [WINDOW - 1]
    assert word in said[WINDOW - 1][0]


def test_a_policy_that_cannot_ask_is_not_told_of() -> None:
    alarms = Alarms(asks=False)
    assert not any(alarms.check({"upscale/ratio": 0.0}) for _ in range(WINDOW + 5))


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
