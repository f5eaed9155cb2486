"""Examples from JSONL, checked like the input of `vtengine generate`; what cannot be used is counted, not replaced."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtengine.cli.inputs import InputRow, RejectedRow, read_inputs


@dataclass(frozen=True)
class Example:
    """A question about an image, with its accepted answers. root: for relative paths. fields: the row's other keys."""

    id: str
    image: str
    question: str
    answers: tuple[str, ...]
    root: Path
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """Examples in file order. rejected: how many rows could not be used, by code.

    fingerprint: SHA-256 of what the examples hold; a resumed run must find the same.
    """

    examples: tuple[Example, ...]
    rejected: Mapping[str, int]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.examples)


def read_dataset(files: Sequence[Path], needs_answer: bool = True) -> Dataset:
    """Reads the files one after another; ids become text and must differ between them.

    Raises ValueError if nothing usable is left; OSError as the files do.
    """
    examples: list[Example] = []
    rejected: Counter[str] = Counter()
    seen: set[str] = set()
    for path in files:
        for row in read_inputs(path):
            if isinstance(row, RejectedRow):
                rejected[row.code] += 1
            elif needs_answer and not row.answers:
                rejected["answer_missing"] += 1
            elif (name := _name(path, row, len(files))) in seen:
                rejected["id_duplicate"] += 1
            else:
                seen.add(name)
                fields = {key: value for key, value in row.carried.items() if key not in ("image", "question")}
                examples.append(Example(name, row.image, row.question, row.answers, path.parent, fields))
    if not examples:
        counts = ", ".join(f"{code} {count}" for code, count in rejected.items()) or "the files are empty"
        raise ValueError(f"data.files: no usable example ({counts}); every row needs image, question and answer")
    return Dataset(tuple(examples), dict(rejected), fingerprint(examples))


def _name(path: Path, row: InputRow, num_files: int) -> str:
    """The row's id as text; one made from the line number gets the file's name, where there are several files."""
    given = str(row.id)
    return f"{path.stem}:{given}" if num_files > 1 and given == f"line-{row.line}" else given


def fingerprint(examples: Sequence[Example]) -> str:
    """Changes when an example, or their order, changes; does not depend on where the files lie."""
    digest = hashlib.sha256()
    for example in examples:
        parts = (example.id, example.image, example.question, example.answers, example.fields)
        digest.update(json.dumps(parts, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
