"""Quantities: read strictly, exactly, and without unbounded work."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vtengine_training.rewards.numbers import UNITS, fold, parse_quantity

READ = [
    ("42", "42", ""),
    ("-42", "-42", ""),
    ("\u221242", "-42", ""),
    ("+3.50", "3.5", ""),
    (".5", "0.5", ""),
    ("1,250.00", "1250", ""),
    ("12,345,678", "12345678", ""),
    ("1 234", "1234", ""),
    ("1\u00a0234", "1234", ""),
    ("３，４５６", "3456", ""),
    ("-3/4", "-3/4", ""),
    ("45 %", "45", "%"),
    ("45 percent", "45", "percent"),
    ("$2.5 million", "2500000", "$"),
    ("-$5", "-5", "$"),
    ("$-5", "-5", "$"),
    ("12€", "12", "€"),
    ("12 dollars", "12", "dollar"),
    ("3k", "3000", ""),
    ("5 km", "5", "km"),
    ("5 kg", "5", "kg"),
    ("3 boxes", "3", "boxes"),
    ("1e5", "100000", ""),
    ("2.5e-3 m", "1/400", "m"),
    ("7.", "7", ""),
]
NOT_READ = [
    *("", " ", "abc", "nan", "inf", "-inf", "1e", "1e31", "1e999999999", "0x10", "1_000", "1,23", "12,34", "1,2345"),
    *("1.234,56", "10²", "½", "1½", "①", "٤٢", "४२", "+-5", "--5", "$5€", "4 or 5", "4, 5", "007", "1/0", "3/4/5"),
    *("between 1 and 5", "4 not", "9" * 65, "5!", "(5)", "5\n6 7", "1 2 3", "1,234 567 8"),
]


@pytest.mark.parametrize(("text", "value", "unit"), READ)
def test_read(text, value, unit):
    found = parse_quantity(text)
    assert found is not None
    assert (found.value, found.unit) == (Fraction(value), unit)


@pytest.mark.parametrize("text", NOT_READ)
def test_not_read(text):
    found = parse_quantity(text)
    assert found is None or found.unit not in ("", *UNITS), found


@given(st.integers(-(10**30), 10**30))
def test_integers_come_back(number):
    for text in (str(number), f"{number:,}"):
        assert parse_quantity(text).value == number


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**12), max_value=10**12))
def test_decimals_come_back_exactly(number):
    assert parse_quantity(f"{number:,f}").value == Fraction(number)


@given(st.fractions(max_denominator=10**9))
def test_ratios_come_back(number):
    found = parse_quantity(f"{number.numerator}/{number.denominator}")
    assert found.value == number and found.is_ratio


@given(st.integers(0, 10**9), st.sampled_from(sorted(UNITS)))
def test_units_scale(number, unit):
    found = parse_quantity(f"{number} {unit}")
    assert found.base_value == number * UNITS[unit][1] and found.dimension == UNITS[unit][0]


@given(st.text())
def test_any_text_is_read_or_refused(text):
    parse_quantity(text)
    fold(text)


@given(st.text(alphabet="0123456789.,/ -+$%ekm", max_size=40))
def test_what_is_read_is_bounded(text):
    found = parse_quantity(text)
    if found is not None:
        assert abs(found.value) < 10**120 and found.value.denominator < 10**120


@given(st.text(alphabet="0123456789", min_size=1, max_size=12), st.characters())
def test_a_stray_character_never_keeps_a_number_of_other_digits(digits, char):
    """Nothing outside ASCII digits, their full-width forms and the grammar's signs becomes part of a number."""
    found = parse_quantity(digits + char)
    wide = chr(ord(char) - 0xFEE0) if 0xFF10 <= ord(char) <= 0xFF19 else char
    if found is not None and found.unit == "" and fold(char) != "k":
        expected = digits + wide if wide.isascii() and wide.isdigit() else digits
        assert found.value == int(expected)
