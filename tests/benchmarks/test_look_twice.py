"""When looking low first stops to pay, by the costs that were measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def break_even(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from suites.look_twice import break_even

    yield break_even
    sys.modules.pop("suites.look_twice", None)


@pytest.mark.parametrize(
    ("costs", "share"),
    [
        ((0.5, 1.5, 1.6, 1.7), 0.125),  # bent: a line from end to end would say 0.42
        ((0.1, 0.4, 0.6, 1.4), 0.75),
        ((0.1, 0.4, 0.6, 0.9), None),
        ((1.2, 1.3, 1.4, 1.5), 0.0),
        ((0.5, 0.6, 1.0, 2.0), 0.5),
    ],
)
def test_it_lies_between_the_shares_that_were_measured(break_even, costs, share):
    assert break_even(costs) == (share if share is None else pytest.approx(share))
