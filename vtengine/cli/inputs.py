"""Strict reading of IN.jsonl: every line becomes a question or a rejection with a code, never an exception.

A row without `image`, or with null or an empty list there, is a question about text alone, unless another key looks as
if it was meant: an image must not get lost by a slip. An empty string is a path that is missing.
A file that gzip has packed is read as what is in it.
Codes: line_not_utf8 · line_too_long · line_not_json · line_not_object · key_reserved · id_wrong_type · id_duplicate ·
image_missing · image_wrong_type · question_missing · question_wrong_type · answer_wrong_type · text_not_unicode.
"""

from __future__ import annotations

import difflib
import errno
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

MAX_LINE_BYTES = 64 * 2**20
GZIP_MAGIC, BYTE_ORDER_MARK = b"\x1f\x8b", b"\xef\xbb\xbf"
RESERVED_KEYS = frozenset(
    {"sample", "status", "error", "expected", "correct", "upscaled", "turns", "visual_tokens", "visual_tokens_full"}
    | {"latency_s", "logprob_sum", "image_path"}
)

IMAGE_KEYS = ("image", "images", "img", "image_url", "image_file", "image_path", "image_name", "picture", "photo")
"""What other people call it."""

RowId = str | int
Change = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class InputRow:
    """One question. `answers`: accepted answers, empty when none was given. `line`: 1-based, in the input file.
    `image`: None where the question is about text alone."""

    line: int
    id: RowId
    image: str | None
    question: str
    answers: tuple[str, ...] = ()
    carried: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RejectedRow:
    """A line that cannot be run. `carried` holds what could be read of it."""

    line: int
    id: RowId
    code: str
    message: str
    carried: dict[str, Any] = field(default_factory=dict)


class _Reject(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def read_inputs(path: Path, change: Change | None = None) -> Iterator[InputRow | RejectedRow]:
    """Rows of a JSONL file, in order; blank lines are skipped. The first row with an id keeps it.

    change: applied to each object before it is checked, for files with other names for the same things.
    Raises OSError when the file cannot be opened or read; nothing that a line holds raises.
    """
    seen: set[str] = set()
    for number, raw, complete in _lines(path):
        row = _parse_line(number, raw, complete, change)
        if isinstance(row, InputRow) and str(row.id) in seen:
            message = f"id {str(row.id)[:80]!r} is already used by an earlier row; ids must differ"
            row = RejectedRow(number, row.id, "id_duplicate", message, row.carried)
        seen.add(str(row.id))
        yield row


def count_inputs(path: Path) -> int:
    """How many rows `read_inputs` gives, without parsing them. Raises OSError as it does."""
    return sum(1 for _ in _lines(path))


def first_rejection(path: Path) -> RejectedRow | None:
    """That of the first line, where no line of the file is a JSON object: it is a file of another kind."""
    first = None
    for number, raw, complete in _lines(path):
        try:
            _load(raw, complete)
            return None
        except _Reject as error:
            first = first or RejectedRow(number, f"line-{number}", error.code, str(error))
    return first


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Lines that are not blank, from 1, without their end, and whether they are within the limit; the rest of a too
    long one is skipped."""
    with path.open("rb") as file:
        packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        file.seek(0)
        lines = enumerate(_cut(gzip.GzipFile(fileobj=file) if packed else file), start=1)  # type: ignore[arg-type]
        try:
            for number, (raw, complete) in lines:
                raw = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
                if raw.strip() or not complete:
                    yield number, raw, complete
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise OSError(errno.EIO, f"its gzip data is damaged ({error})", str(path)) from None


def _cut(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    while raw := file.readline(MAX_LINE_BYTES + 1):
        complete = len(raw) <= MAX_LINE_BYTES or raw.endswith(b"\n")
        rest = raw
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
        yield raw.rstrip(b"\r\n"), complete


def _parse_line(number: int, raw: bytes, complete: bool, change: Change | None) -> InputRow | RejectedRow:
    try:
        record = _load(raw, complete)
    except _Reject as error:
        return RejectedRow(number, f"line-{number}", error.code, str(error))
    return check_record(number, record if change is None else change(record))


def check_record(number: int, record: dict[str, Any]) -> InputRow | RejectedRow:
    """The `number`-th row (1-based) of any source, checked as a line of JSONL is."""
    row_id: RowId = record["id"] if _is_id(record.get("id")) else f"line-{number}"
    carried = {key: value for key, value in record.items() if key not in RESERVED_KEYS and key not in ("id", "answer")}
    try:
        return _check_record(number, row_id, record, carried)
    except _Reject as error:
        if error.code == "text_not_unicode":
            row_id, carried = f"line-{number}", {}
        return RejectedRow(number, row_id, error.code, str(error), carried)


def _load(raw: bytes, complete: bool) -> dict[str, Any]:
    if not complete:
        raise _Reject("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Reject("line_not_utf8", f"byte {error.start} of the line is not UTF-8") from None
    try:
        record = json.loads(text, parse_constant=_bad_number, parse_float=_finite, object_pairs_hook=_unique_keys)
        text.encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _Reject("line_not_json", f"not a JSON object on one line: {reason}") from None
    if not isinstance(record, dict):
        raise _Reject("line_not_object", f"a row is a JSON object, this one is {_kind(record)}")
    return record


def _check_record(number: int, row_id: RowId, record: dict[str, Any], carried: dict[str, Any]) -> InputRow:
    if not _encodable(record):
        raise _Reject("text_not_unicode", "a string holds half of a surrogate pair, which is no Unicode text")
    reserved = sorted(RESERVED_KEYS & record.keys())
    if reserved:
        raise _Reject("key_reserved", f"key {reserved[0]!r} is written by vtengine; rename it in the input")
    if record.get("id") is not None and not _is_id(record["id"]):
        raise _Reject("id_wrong_type", f"id must be a non-empty string or an integer, not {_kind(record['id'])}")
    image = _image(record)
    question = _text(record, "question")
    return InputRow(number, row_id, image, question, _answers(record.get("answer")), carried)


def _image(record: Mapping[str, Any]) -> str | None:
    """None where there is none. Raises _Reject where another key holds what may have been meant for it."""
    if record.get("image") not in (None, []):
        return _text(record, "image")
    for key, value in record.items():
        close = difflib.get_close_matches(key.lower(), IMAGE_KEYS, 1, 0.8)
        if close and key != "image" and value and isinstance(value, str | list | dict):
            raise _Reject("image_missing", f"key 'image' is missing or empty; the row has {key!r}")
    return None


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None or value == "":
        near = difflib.get_close_matches(key, [name for name in record if name != key], 1)
        hint = f"; the row has {near[0]!r}" if near else ""
        raise _Reject(f"{key}_missing", f"key {key!r} is missing or empty{hint}")
    if not isinstance(value, str):
        raise _Reject(f"{key}_wrong_type", f"{key} must be a string, not {_kind(value)}")
    if not value.strip():
        raise _Reject(f"{key}_missing", f"{key} holds only white space")
    return value


def _answers(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    for item in values:
        if not isinstance(item, str | int | float) or isinstance(item, bool):
            raise _Reject("answer_wrong_type", f"answer must be text, a number or a list of them, not {_kind(item)}")
    return tuple(str(item) for item in values)


def _is_id(value: Any) -> bool:
    return (isinstance(value, str) and value.strip() != "") or (isinstance(value, int) and not isinstance(value, bool))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return record


def _bad_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _encodable(record: dict[str, Any]) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
