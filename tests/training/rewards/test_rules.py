"""What rules decide, and what they leave to a judge."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vtengine_training.rewards.rules import KINDS, Task, decide

CHOICES = "Which animal is it?\nA. cat\nB. dog\n(C) red fox"
TABLE = [
    ("5", ".5", "", {}, False),
    (".5", "5", "", {}, False),
    (".5", "(.5)", "", {}, True),
    # reference, answer, question, fields -> verdict
    ("red", "red", "", {}, True),
    ("red", "Red.", "", {}, True),
    ("red car", "the  Red car!", "", {}, True),
    ("red", "The answer is red", "", {}, True),
    ("red", "Answer: red", "", {}, True),
    ("red", r"\boxed{red}", "", {}, True),
    ("red", "blue", "", {}, None),
    ("red", "red or blue", "", {}, None),
    ("red", "", "", {}, False),
    ("red", " \n", "", {}, False),
    ("red", None, "", {}, False),
    ("red", "x" * 1001, "", {}, False),
    ("x" * 2000, "x" * 2000, "", {}, True),
    ("42", "42", "", {}, True),
    ("42", "42.0", "", {}, True),
    ("1250", "1,250.00", "", {}, True),
    ("42", "43", "", {}, False),
    ("42", "forty-two", "", {}, None),
    ("42", "42 or 43", "", {}, None),
    ("42", "42 apples", "How many apples are there?", {}, True),
    ("42", "42 apples", "How many pears are there?", {}, None),
    ("102", "10²", "", {}, None),
    ("$1,250", "1250", "", {}, True),
    ("$1,250", "1250 dollars", "", {}, True),
    ("$1,250", "€1250", "", {}, None),
    ("$1,250", "€1251", "", {}, False),
    ("50 mm", "5 cm", "", {}, True),
    ("50 mm", "5 mm", "", {}, False),
    ("50 mm", "50", "", {}, True),
    ("2 h", "120 minutes", "", {}, True),
    ("45%", "45 percent", "", {}, True),
    ("45%", "0.45", "", {}, True),
    ("45%", "45", "", {}, True),
    ("45%", "46%", "", {}, False),
    ("1", "100%", "", {}, None),
    ("0.45", "45%", "", {}, True),
    ("100", "103", "", {"tolerance": 0.05}, True),
    ("100", "106", "", {"tolerance": 0.05}, False),
    ("3/4", "3/4", "", {}, True),
    ("3/4", "6/8", "", {}, None),
    ("3/4", "0.75", "", {"answer_type": "number"}, True),
    ("3/4", "4/3", "", {}, False),
    ("007", "7", "", {}, None),
    ("007", "007", "", {}, True),
    ("yes", "Yes.", "", {}, True),
    ("yes", "true", "", {}, True),
    ("yes", "no", "", {}, False),
    ("no", "No", "", {}, True),
    ("yes", "yes and no", "", {}, None),
    ("yes", "yes, there is", "", {}, None),
    ("B", "B", CHOICES, {}, True),
    ("B", "(b)", CHOICES, {}, True),
    ("B", "B.", CHOICES, {}, True),
    ("B", "Option B", CHOICES, {}, None),
    ("B", "The correct answer is B", CHOICES, {}, True),
    ("B", "B. dog", CHOICES, {}, True),
    ("B", "dog", CHOICES, {}, True),
    ("dog", "B", CHOICES, {}, True),
    ("B", "C", CHOICES, {}, False),
    ("B", "cat", CHOICES, {}, False),
    ("B", "A and B", CHOICES, {}, False),
    ("B", "A, B, C", CHOICES, {}, False),
    ("B", "B. cat", CHOICES, {}, None),
    ("B", "wolf", CHOICES, {}, None),
    ("B", "dog", "Which?", {"options": ["cat", "dog"]}, True),
    ("X", "left", "Which?", {"options": {"X": "left", "Y": "right"}, "answer_type": "choice"}, True),
    ("B", "B", "", {}, True),
    ('["red", "blue"]', "blue, red", "", {}, True),
    ('["red", "blue"]', "blue and red", "", {}, True),
    ('["red", "blue"]', "red", "", {}, None),
    ('["red", "blue"]', "red, blue, green", "", {}, None),
    ("red, blue", "blue; red", "", {"answer_type": "list"}, True),
    ("red, blue", "blue, red", "", {"answer_type": "ordered_list"}, False),
    ("red, blue", "red, blue", "", {"answer_type": "ordered_list"}, True),
    ("1, 2, 3", "3,2,1", "", {"answer_type": "list"}, True),
    ("1, 2, 3", "1, 2", "", {"answer_type": "list"}, False),
    ("1,250; 3", "3, 1250", "", {"answer_type": "list"}, True),
    ("1, 1, 2", "1, 2, 2", "", {"answer_type": "list"}, False),
]


@pytest.mark.parametrize(("reference", "answer", "question", "fields", "expected"), TABLE)
def test_table(reference, answer, question, fields, expected):
    assert decide(answer, Task.of(question, [reference], fields)) is expected


def test_any_reference_may_match_and_all_must_fail():
    task = Task.of("", ["4", "four"], {})
    assert decide("four", task) is True
    assert decide("5", task) is None
    assert decide("5", Task.of("", ["4", "6"], {})) is False


@pytest.mark.parametrize(
    "fields",
    [
        *({"answer_type": "nubmer"}, {"tolerance": 2}, {"tolerance": "x"}, {"tolerance": float("nan")}),
        *({"options": "A"}, {"tolerance": True}),
    ],
)
def test_a_row_that_cannot_be_used_is_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Task.of("", ["4"], fields)


@given(st.text(max_size=60), st.text(min_size=1, max_size=60), st.sampled_from([None, *KINDS]), st.text(max_size=60))
def test_nothing_raises(answer, reference, kind, question):
    decide(answer, Task.of(question, [reference], {"answer_type": kind} if kind else {}))


@given(st.text(min_size=1, max_size=80).filter(str.strip))
def test_a_reference_is_its_own_answer(text):
    assert decide(text, Task.of("", [text], {})) is True


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_numbers_are_equal_or_not(left, right):
    assert decide(f"{left:,}", Task.of("", [str(right)], {})) is (left == right)
