"""Answers are compared by rule."""

from __future__ import annotations

import pytest

from vtengine.cli.scoring import is_correct


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("Yes.", ["yes"]),
        (" 1,250.00 ", ["1250"]),
        ("$4.50", ["$4.5"]),
        ("12 %", ["12 %"]),
        ("75%", ["75.0%"]),
        ("NEW\n YORK", ["new york"]),
        ("b", ["a", "B"]),
        ("-3", ["-3.0"]),
        ("\N{FULLWIDTH DIGIT FOUR}", ["4"]),
        ("...", ["..."]),
        ("-0.0", ["0"]),
        ("+007", ["7"]),
        (".5", ["0.50"]),
        ("-.5.", ["-0.5"]),
        ("$.50", ["$0.50"]),
        ("...5", ["5"]),
        ("\N{ARABIC-INDIC DIGIT THREE}", ["3"]),
        ("1" * 5000 + ".50", ["1" * 5000 + ".5"]),
    ],
)
def test_right(answer: str, accepted: list[str]) -> None:
    assert is_correct(answer, accepted)


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        (None, ["x"]),
        ("", ["x"]),
        ("3", ["-3"]),
        ("12", ["1", "2"]),
        ("75", ["75%"]),
        ("yes no", ["yes"]),
        ("x", []),
        ("1,25", ["125"]),
        ("1" * 40 + "2", ["1" * 40 + "3"]),
        ("1" * 90 + "2", ["1" * 90 + "3"]),
        ("0.0", ["0.00001"]),
        (".5", ["5"]),
        ("5", [".5"]),
        (".", ["0"]),
    ],
)
def test_wrong(answer: str | None, accepted: list[str]) -> None:
    assert not is_correct(answer, accepted)
