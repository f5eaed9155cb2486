"""Examples from files, checked like the input of `vtengine generate`; what cannot be used is counted, not replaced."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from vtengine.cli.inputs import InputRow, RejectedRow, check_record, read_inputs
from vtengine.vision.source import is_url
from vtengine_training.data.columns import BadImage, check_columns, plain, rename
from vtengine_training.data.config import SourceConfig
from vtengine_training.data.images import ImageStore
from vtengine_training.data.tables import (
    is_saved_dataset,
    parquet_columns,
    parquet_files,
    parquet_records,
    saved_columns,
    saved_records,
)

SourceRow = tuple[InputRow | RejectedRow, Path]
"""A row, and the folder its image path is relative to."""


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
    """Examples in file order. rejected: how many rows could not be used, by code."""

    examples: tuple[Example, ...]
    rejected: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the examples hold, wherever the files lie; a resumed run must find the same."""
        digest = hashlib.sha256()
        for example in self.examples:
            parts = (example.id, example.image, example.question, example.answers, example.fields)
            digest.update(json.dumps(parts, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


def read_dataset(
    files: Sequence[Path], source: SourceConfig | None = None, images: Path | None = None, section: str = "data"
) -> Dataset:
    """Reads the files one after another; ids become text and must differ between them.

    source: columns, texts to remove and max_rows. images: the folder that encoded images of tables are unpacked to;
    None: tables are refused. section: of the configuration, for the words of an error. Raises ValueError if nothing
    usable is left, or no row has a mapped column; OSError as the files do.
    """
    source = source or SourceConfig()
    examples: list[Example] = []
    rejected: Counter[str] = Counter()
    seen: set[str] = set()
    keys: set[str] = set()
    rows = ((path, row) for path in files for row in _rows(path, source, images))
    for path, (row, root) in islice(rows, source.max_rows):
        keys |= row.carried.keys() | ({"id"} if row.id != f"line-{row.line}" else set())
        if isinstance(row, RejectedRow):
            rejected[row.code] += 1
        elif row.image is None:
            rejected["image_missing"] += 1
        elif not (answers := tuple(answer for answer in row.answers if answer.strip())):
            rejected["answer_missing"] += 1
        elif row.carried.get("needs_high") not in (None, 0, 1):  # True and False are among them
            rejected["needs_high_wrong_type"] += 1
        elif (name := _name(path, row, len(files))) in seen:
            rejected["id_duplicate"] += 1
        else:
            seen.add(name)
            fields = {key: value for key, value in row.carried.items() if key not in ("image", "question")}
            image = row.image
            if source.image_root and root != images:  # what was unpacked lies where we put it
                image, root = _below(Path(source.image_root), image, root)
            examples.append(Example(name, image, row.question, answers, root, fields))
    if not examples:
        counts = ", ".join(f"{code} {count}" for code, count in rejected.items()) or "the files are empty"
        raise ValueError(f"{section}.files: no usable example ({counts}); every row needs image, question and answer")
    for ours in sorted(source.columns.keys() - keys - {"image", "question", "answer"}):
        found = ", ".join(sorted(keys))
        raise ValueError(f"{section}.columns.{ours} = {source.columns[ours]!r}: no row has it; the rows have {found}")
    return Dataset(tuple(examples), dict(rejected))


def _below(image_root: Path, image: str, folder: Path) -> tuple[str, Path]:
    """(image, root): a path from `folder` as one from the root, which it may not lead out of. URLs stay."""
    if is_url(image):
        return image, folder
    # Without symlinks, which may give one place two names.
    return Path(os.path.relpath(os.path.realpath(folder / image), os.path.realpath(image_root))).as_posix(), image_root


def _rows(path: Path, source: SourceConfig, images: Path | None) -> Iterator[SourceRow]:
    """The rows of a file or folder, by what it is."""
    if path.suffix != ".parquet" and not path.is_dir():
        for row in read_inputs(path, lambda record: rename(record, source.columns, source.remove)):
            yield row, path.parent
        return
    if images is None:
        raise ValueError(f"{path}: only JSONL can be read here")
    store = ImageStore(images)
    if is_saved_dataset(path):
        check_columns(source.columns, saved_columns(path), path)
        yield from _checked(saved_records(path), path, source, store)
        return
    shards = parquet_files(path)
    if not shards:
        raise ValueError(f"{path}: the folder holds neither a saved dataset nor parquet files")
    for shard in shards:
        check_columns(source.columns, parquet_columns(shard), shard)
    records = (record for shard in shards for record in parquet_records(shard))
    yield from _checked(records, path if path.is_dir() else path.parent, source, store)


def _checked(
    records: Iterator[dict[str, Any]], folder: Path, source: SourceConfig, store: ImageStore
) -> Iterator[SourceRow]:
    for number, record in enumerate(records, start=1):
        try:
            row, stored = plain(rename(record, source.columns, source.remove), store)
        except BadImage as error:
            yield RejectedRow(number, f"line-{number}", error.code, str(error)), folder
            continue
        yield check_record(number, row), store.folder if stored else folder


def _name(path: Path, row: InputRow, num_files: int) -> str:
    """The row's id as text; one made from the line number gets the file's name, where there are several files."""
    given = str(row.id)
    return f"{path.stem}:{given}" if num_files > 1 and given == f"line-{row.line}" else given
