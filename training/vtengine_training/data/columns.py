"""From a record as its file has it to one as `vtengine generate` reads it: columns renamed, the image made a source."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from vtengine_training.data.images import MAX_BYTES, ImageStore

Record = dict[str, Any]


class BadImage(ValueError):
    """The row's image cannot be used; `code` says why, as those of vtengine.cli.inputs do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def rename(record: Record, columns: Mapping[str, str], remove: Iterable[str] = ()) -> Record:
    """`columns`: our name = theirs, dotted for a part of a struct. A column that was renamed whole loses its old name.

    What is not there is left out, so that the row is then rejected by name. remove: texts taken out of the question.
    """
    found = {key: value for key, value in record.items() if key not in columns.values()}
    for ours, theirs in columns.items():
        value: Any = record
        for part in theirs.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        found.pop(ours, None)
        if value is not None:
            found[ours] = value
    question = found.get("question")
    if isinstance(question, str):
        for text in remove:
            question = question.replace(text, "").strip()
        found["question"] = question
    return found


def check_columns(columns: Mapping[str, str], known: Iterable[str], where: object) -> None:
    """Raises ValueError where a mapped column is not in the table, or question, image or answer is from nowhere."""
    names = list(known)
    for ours, theirs in columns.items():
        if theirs.partition(".")[0] not in names:
            raise ValueError(f"columns.{ours} = {theirs!r}: {where} has no such column; it has {', '.join(names)}")
    for ours in ("image", "question", "answer"):
        if ours not in columns and ours not in names:
            raise ValueError(
                f'{where}: has no column {ours}; say which it is with columns.{ours} = "…": {", ".join(names)}'
            )


def plain(record: Record, store: ImageStore) -> tuple[Record, bool]:
    """The record with its image as a path or URL, and whether that is a path below the store.

    An image is text, encoded bytes, {bytes, path} as Hugging Face datasets write it, or a list of one of these. Values
    that JSON cannot hold are left out. Raises BadImage.
    """
    source, stored = _image(record.get("image"), store)
    found = {key: value for key, value in record.items() if key != "image" and _is_json(value)}
    return found | ({} if source is None else {"image": source}), stored


def _image(value: Any, store: ImageStore) -> tuple[Any, bool]:
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise BadImage("image_not_single", f"the row has {len(value)} images; one is supported")
        value = value[0] if value else None
    if isinstance(value, Mapping):
        encoded = value.get("bytes")
        value = value.get("path") if encoded is None else encoded
    if not isinstance(value, bytes):
        return value, False
    if not value:
        raise BadImage("image_empty", "the image has 0 bytes")
    if len(value) > MAX_BYTES:
        raise BadImage("image_too_large_bytes", f"the image has {len(value)} bytes: at most {MAX_BYTES} are accepted")
    return store.put(value), True


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
