"""Whether an answer equals one of the accepted answers, by rule: no model, no judge.

Case, surrounding white space, outer punctuation and quotes do not count; numbers are compared by value
("1,250.00" equals "1250"), with an optional currency or percent sign on both or neither.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?P<unit>[$€£¥]?)(?P<digits>\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?P<fraction>\.\d+)?(?P<percent>%?)"
)
_OUTER = " \t\r\n.,;:!?\"'`()[]{}\u201c\u201d\u2018\u2019"


def is_correct(answer: str | None, accepted: Sequence[str]) -> bool:
    """True when `answer` equals one of `accepted` after normalisation; no answer is never right."""
    if answer is None:
        return False
    given = normalise(answer)
    return any(given == normalise(text) for text in accepted)


def normalise(text: str) -> str:
    """The form that is compared. Numbers become plain decimals, other text folded words with single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    number = _NUMBER.fullmatch(without_outer(text, _OUTER))
    if number is not None:
        whole = _ascii(number["digits"].replace(",", "")).lstrip("0") or "0"
        fraction = _ascii(number["fraction"] or "").rstrip("0").rstrip(".")
        sign = "-" if number["sign"] == "-" and whole + fraction != "0" else ""
        return f"{number['unit']}{sign}{whole}{fraction}{number['percent']}"
    words = " ".join(text.split())
    return without_outer(words, _OUTER) or words


def without_outer(text: str, marks: str) -> str:
    """Without the marks around it; the point of ".5" is none of them."""
    bare = text.strip(marks)
    head = text.rstrip(marks).removesuffix(bare)
    return "." + bare if bare[:1].isdecimal() and head.endswith(".") and not head.endswith("..") else bare


def _ascii(digits: str) -> str:
    """Decimal digits of any script as 0 to 9; exact at any length."""
    return "".join(char if char == "." else str(unicodedata.decimal(char)) for char in digits)
