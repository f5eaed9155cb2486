"""Quantities in answers: "1,250.00", "-3/4", "45 %", "$2.5 million", "12 cm". Exact rational arithmetic, bounded size.

Read strictly: the whole text is one quantity, or it is none. Superscripts, digits of other scripts, European decimal
commas and leading zeros (007 is a name, not a 7) are not guessed at.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 64
MAX_EXPONENT = 30

_NUMBER = r"(?:[1-9][0-9]{0,2}(?:[, ][0-9]{3})+|0|[1-9][0-9]*)(?:\.[0-9]+)?|\.[0-9]+"
_QUANTITY = re.compile(
    rf"(?P<sign>[-+]?)\s?(?P<currency>[$€£¥₹]?)\s?(?P<sign2>[-+]?)"
    rf"(?:(?P<numerator>0|[1-9][0-9]*)\s?/\s?(?P<denominator>[1-9][0-9]*)|(?P<number>{_NUMBER})(?:e(?P<exponent>[-+]?[0-9]{{1,3}}))?)"
    r"\s?(?P<scale>k|thousand|million|billion|trillion|mn|bn)?(?![a-z])"
    r"\s?(?P<unit>%|[$€£¥₹]|[a-zµμ°][a-zµμ°²³/]*)?\.?"
)
_SCALES = {"k": 3, "thousand": 3, "million": 6, "mn": 6, "billion": 9, "bn": 9, "trillion": 12}
_CURRENCIES = {
    "$": "usd", "dollar": "usd", "usd": "usd", "€": "eur", "euro": "eur", "eur": "eur", "£": "gbp",
    "gbp": "gbp", "¥": "yen", "yen": "yen", "₹": "inr", "rupee": "inr", "cent": "cent",
}  # fmt: skip


def _scaled(dimension: str, **factors: str) -> dict[str, tuple[str, Fraction]]:
    return {name: (dimension, Fraction(factor)) for name, factor in factors.items()}


UNITS: Mapping[str, tuple[str, Fraction]] = {
    "%": ("ratio", Fraction(1, 100)),
    **_scaled("ratio", percent="1/100", pct="1/100"),
    **_scaled("length", mm="1/1000", cm="1/100", m="1", km="1000", inch="0.0254", inches="0.0254"),
    **_scaled("length", ft="0.3048", foot="0.3048", feet="0.3048", yd="0.9144", yard="0.9144", mi="1609.344"),
    **_scaled("length", millimeter="1/1000", centimeter="1/100", meter="1", kilometer="1000", mile="1609.344"),
    **_scaled("length", millimetre="1/1000", centimetre="1/100", metre="1", kilometre="1000"),
    **_scaled(
        "mass", mg="1/1000000", g="1/1000", kg="1", t="1000", lb="0.45359237", lbs="0.45359237", oz="0.028349523125"
    ),
    **_scaled("mass", milligram="1/1000000", gram="1/1000", kilogram="1", tonne="1000", pound="0.45359237"),
    **_scaled("time", ms="1/1000", s="1", sec="1", second="1", min="60", minute="60", h="3600", hr="3600", hour="3600"),
    **_scaled("time", day="86400", week="604800"),
    **_scaled("volume", ml="1/1000", cl="1/100", l="1", liter="1", litre="1", milliliter="1/1000", millilitre="1/1000"),
    **{sign: (f"money/{name}", Fraction(1)) for sign, name in _CURRENCIES.items()},
}


@dataclass(frozen=True)
class Quantity:
    """value: as written, the unit not applied. unit: as written, lower case, "" = none; a known plural is singular.

    is_ratio: written as "a/b", which may be a date or a score as well.
    """

    value: Fraction
    unit: str = ""
    is_ratio: bool = False

    @property
    def dimension(self) -> str:
        """What can be compared with what; an unknown unit is its own dimension."""
        return UNITS[self.unit][0] if self.unit in UNITS else self.unit

    @property
    def base_value(self) -> Fraction:
        """The value in the base unit of its dimension."""
        return self.value * UNITS[self.unit][1] if self.unit in UNITS else self.value


def fold(text: str) -> str:
    """Lower case, one kind of space and minus, full-width forms as ASCII; superscripts and the like stay."""
    folded = []
    for char in text:
        kind = unicodedata.decomposition(char).partition(" ")[0]
        folded.append(unicodedata.normalize("NFKC", char) if kind in ("<wide>", "<narrow>", "<noBreak>") else char)
    plain = unicodedata.normalize("NFC", "".join(folded)).casefold()
    return " ".join(plain.replace("\u2212", "-").split())


def parse_quantity(text: str) -> Quantity | None:
    """The quantity that the whole text is, or None. Never raises."""
    text = fold(text[: 4 * MAX_CHARS]).strip()
    if not text or len(text) > MAX_CHARS:
        return None
    found = _QUANTITY.fullmatch(text)
    if found is None or (found["sign"] and found["sign2"]) or (found["currency"] and found["unit"]):
        return None
    if found["number"] is not None:
        digits = found["number"].replace(",", "").replace(" ", "")
        exponent = int(found["exponent"] or 0)
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = Fraction(digits) * Fraction(10) ** exponent
    else:
        value = Fraction(int(found["numerator"]), int(found["denominator"]))
    value *= 10 ** _SCALES[found["scale"]] if found["scale"] else 1
    if "-" in (found["sign"], found["sign2"]):
        value = -value
    return Quantity(value, _unit(found["currency"] or found["unit"] or ""), found["number"] is None)


def _unit(text: str) -> str:
    for name in (text, text.removesuffix("s"), text.removesuffix("es")):
        if name in UNITS:
            return name
    return text
