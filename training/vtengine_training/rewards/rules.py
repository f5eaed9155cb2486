"""Whether an answer is right, decided by rule: right, wrong, or not decidable without understanding language.

Kinds of reference: `exact`, `number`, `choice`, `yes_no`, `list` (any order), `ordered_list`. A dataset row names one
in `answer_type`; otherwise it is inferred from the reference. Rules look at the whole answer: one that offers the right
thing among others is not right.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, get_args

from vtengine.cli.scoring import without_outer
from vtengine_training.rewards.numbers import Quantity, fold, parse_quantity

Kind = Literal["exact", "number", "choice", "yes_no", "list", "ordered_list"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_ANSWER = 1000
"""Characters. A longer answer is wrong, unless the reference is long too (then four times its length)."""
MAX_ITEMS = 64

_YES_NO = {"yes": True, "true": True, "no": False, "false": False}
_OUTER = " .,;:!?\"'`()\u201c\u201d\u2018\u2019"
_BOXED = re.compile(r"\$?\\boxed\{(?P<inner>[^{}]*)\}\$?\.?")
_LEAD = re.compile(r"(?:the )?(?:final |correct )?(?:answer|option|choice)(?: is:?|:) ?")
_LETTER = re.compile(r"[(\[]?(?P<letter>[a-j])(?:[)\].:]|(?=$| ))(?P<rest>.*)")
_MANY_LETTERS = re.compile(r"[(\[]?[a-j][)\].:]?(?:(?: ?[,;/&+] ?| and | or | )[(\[]?[a-j][)\].:]?)+\.?")
_OPTION_LINE = re.compile(r"^\s*[(\[]?([A-Ja-j])[)\].:]\s+(\S.*?)\s*$", re.MULTILINE)
_SEPARATORS = re.compile(r"\s*[;\n]\s*|,\s+(?:and\s+)?|,(?![0-9])\s*|\s+and\s+")


@dataclass(frozen=True)
class Task:
    """What an answer is measured by. kind: None = inferred from each reference. options: letter -> text, for choices.

    tolerance: how far a number may be off, as a share of the reference.
    """

    question: str
    references: tuple[str, ...]
    kind: Kind | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    tolerance: Fraction = Fraction(0)

    @classmethod
    def of(cls, question: str, references: Sequence[str], fields: Mapping[str, Any], tolerance: float = 0.0) -> Task:
        """From a dataset row: `answer_type`, `options` (list or table) and `tolerance` are read. Raises ValueError."""
        kind = fields.get("answer_type")
        if kind is not None and kind not in KINDS:
            raise ValueError(f"answer_type = {kind!r}: must be one of {', '.join(KINDS)}")
        given = fields.get("tolerance", tolerance)
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1 or math.isnan(given):
            raise ValueError(f"tolerance = {given!r}: must be a number from 0 to 1, a share of the reference")
        return cls(question, tuple(references), kind, _options(question, fields.get("options")), Fraction(str(given)))


def decide(answer: str | None, task: Task) -> bool | None:
    """True = right, False = wrong, None = the rules do not decide. No answer is wrong. Never raises for text."""
    if answer is None or not answer.strip() or len(answer) > answer_limit(task.references):
        return False
    verdicts = [_decide_one(answer, reference, task) for reference in task.references]
    if True in verdicts:
        return True
    return None if None in verdicts or not verdicts else False


def answer_limit(references: Sequence[str]) -> int:
    """Characters; see MAX_ANSWER."""
    return max(MAX_ANSWER, 4 * max(map(len, references), default=0))


def infer_kind(reference: str, options: Mapping[str, str]) -> Kind:
    """The kind of a reference that does not say. A single letter is a choice only where there are options."""
    text = fold(reference).strip(_OUTER)
    if text in _YES_NO:
        return "yes_no"
    if options and (_sole_letter(text) in options or text in map(normalise, options.values())):
        return "choice"
    if parse_quantity(reference) is not None:
        return "number"
    return "list" if _json_list(reference) is not None else "exact"


def normalise(text: str) -> str:
    """Folded words with single spaces; without outer punctuation and a leading article, unless nothing else is left."""
    words = fold(text)
    words = without_outer(words, _OUTER) or words
    first, _, rest = words.partition(" ")
    return rest if first in ("the", "a", "an") and rest else words


def _decide_one(answer: str, reference: str, task: Task) -> bool | None:
    kind = task.kind or infer_kind(reference, task.options)
    given = _unwrap(answer)
    if normalise(given) == normalise(reference) and kind not in ("choice", "ordered_list", "list"):
        return True
    if kind == "number":
        return _decide_number(given, reference, task)
    if kind == "choice":
        return _decide_choice(given, reference, task.options)
    if kind == "yes_no":
        words = normalise(given), normalise(reference)
        return _YES_NO[words[0]] is _YES_NO[words[1]] if all(word in _YES_NO for word in words) else None
    if kind == "exact":
        return None
    return _decide_list(given, reference, is_ordered=kind == "ordered_list")


def _unwrap(answer: str) -> str:
    """Without "The answer is", \\boxed{} and surrounding space."""
    text = answer.strip()
    lead = _LEAD.match(fold(text))
    if lead is not None and ":" in text[: lead.end()]:
        text = text[text.index(":") + 1 :].strip()
    elif lead is not None and lead[0].rstrip().endswith("is"):
        text = re.split(r"\bis\b", text, maxsplit=1, flags=re.IGNORECASE)[-1].strip()
    boxed = _BOXED.fullmatch(text)
    return boxed["inner"].strip() if boxed is not None else text


def _decide_number(answer: str, reference: str, task: Task) -> bool | None:
    given, wanted = parse_quantity(answer.rstrip(" .")), parse_quantity(reference)
    if given is None or wanted is None:
        return None

    def close(left: Fraction, right: Fraction) -> bool:
        return abs(left - right) <= task.tolerance * abs(right)

    if (given.is_ratio or wanted.is_ratio) and task.kind is None and close(given.value, wanted.value):
        return None  # 6/8 is 3/4 as a number, not as a date; the same text was right before
    if given.unit and wanted.unit:
        if given.dimension == wanted.dimension:
            return close(given.base_value, wanted.base_value)
        return None if close(given.value, wanted.value) else False
    if close(given.value, wanted.value):
        # A unit that only the answer names is one that the question asks for, or nothing that rules can judge.
        is_asked_for = given.unit == "" or _names(task.question, given.unit)
        return True if is_asked_for else None
    is_share = "%" in (given.unit, wanted.unit) or "percent" in (given.unit, wanted.unit)
    if is_share and close(given.base_value, wanted.base_value):
        return True if min(abs(given.base_value), abs(wanted.base_value)) < 1 else None
    return False


def _names(question: str, unit: str) -> bool:
    words = set(re.findall(r"[^\W\d_]+|%", fold(question)))
    return any(form in words for form in (unit, unit + "s", unit + "es", unit.removesuffix("s")))


def _decide_choice(answer: str, reference: str, options: Mapping[str, str]) -> bool | None:
    wanted, given = _choice(reference, options), _choice(answer, options)
    if wanted is None:
        return None
    if given is not None:
        return given == wanted
    return False if _MANY_LETTERS.fullmatch(fold(answer)) else None


def _choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that the text picks: alone, with its own option's text, or by that text."""
    plain = fold(text)
    for letter, option in options.items():
        if normalise(plain) == normalise(option):
            return letter
    sole = _sole_letter(plain)
    if sole is not None and (sole in options or (not options and "a" <= sole <= "j")):
        return sole
    found = _LETTER.fullmatch(plain)
    if found is not None and found["letter"] in options:
        return found["letter"] if normalise(found["rest"]) == normalise(options[found["letter"]]) else None
    return None


def _sole_letter(text: str) -> str | None:
    bare = text.strip(" ()[].:")
    return bare if len(bare) == 1 and bare.isalnum() else None


def _options(question: str, given: Any) -> dict[str, str]:
    """letter -> text, letters lower case. Read from the question's own lines where the row does not give them."""
    if isinstance(given, Mapping):
        return {fold(str(letter)): str(text) for letter, text in given.items()}
    if isinstance(given, list | tuple):
        return {chr(ord("a") + place): str(text) for place, text in enumerate(given[:10])}
    if given is not None:
        raise ValueError(f"options = {given!r}: must be a list of texts, or a table from letter to text")
    found = {letter.lower(): text for letter, text in _OPTION_LINE.findall(question[:20_000])}
    return found if len(found) >= 2 and "a" in found else {}


def _decide_list(answer: str, reference: str, *, is_ordered: bool) -> bool | None:
    given, wanted = _items(answer), _items(reference)
    if given is None or wanted is None:
        return None
    if given == wanted or (not is_ordered and Counter(given) == Counter(wanted)):
        return True
    all_numbers = all(isinstance(item, tuple) for item in (*given, *wanted))
    is_permuted = is_ordered and Counter(given) == Counter(wanted)
    return False if all_numbers or is_permuted else None


def _items(text: str) -> list[Hashable] | None:
    """The items in comparable form: (base value, dimension) for a quantity, else normal text."""
    parts = _json_list(text)
    if parts is None:
        split = _SEPARATORS.split(_unbracket(text.strip()))
        parts = [part for piece in split for part in _more_parts(piece) if part.strip()]
    if not parts or len(parts) > MAX_ITEMS:
        return None
    items: list[Hashable] = []
    for part in parts:
        found: Quantity | None = parse_quantity(part)
        items.append(normalise(part) if found is None else (found.base_value, found.dimension))
    return items


def _unbracket(text: str) -> str:
    """Without one pair of brackets around the whole."""
    return text[1:-1] if len(text) > 2 and text[0] + text[-1] in ("[]", "()", "{}") else text


def _more_parts(piece: str) -> list[str]:
    """ "1,250" is one number, "1,2" is two."""
    return piece.split(",") if "," in piece and parse_quantity(piece) is None else [piece]


def _json_list(text: str) -> list[str] | None:
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > 20_000:
        return None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, list) or not data or not all(isinstance(item, str | int | float) for item in data):
        return None
    return [str(item) for item in data]
