"""The files of a curation: rows as they come, a state to compare with, and parquet at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from vtengine.rollout.records import encode_row, read_rows, whole_rows
from vtengine_training.data.tables import BATCH_ROWS, need
from vtengine_training.files import write_whole

Row = dict[str, Any]
ROWS, STATE = "curated.jsonl", "state.json"


class Output:
    """The folder. Rows are appended in the order of the examples, so their number says where to go on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows_path = folder, folder / ROWS

    def begin(self, what: Mapping[str, Any]) -> list[Row]:
        """The rows that an earlier call left; a torn last one is cut off.

        what: decides the content. Raises ValueError where those rows were made with something else.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.folder / STATE
        wanted = json.loads(json.dumps(what))
        if not state.is_file():
            write_whole(state, json.dumps(wanted, indent=1))
            self.rows_path.write_bytes(b"")
            return []
        _compare(json.loads(state.read_text(encoding="utf-8")), wanted, self.folder)
        rows, end = [], 0
        if self.rows_path.is_file():
            for row, offset in whole_rows(self.rows_path):
                rows.append(row)
                end = offset
            with self.rows_path.open("r+b") as file:
                file.truncate(end)
        return rows

    def append(self, row: Row) -> None:
        """Hands the row to the operating system at once."""
        with self.rows_path.open("ab") as file:
            file.write(encode_row(row))

    def write_parquet(self) -> Path:
        """curated.parquet: the rows with their images in it, as {bytes, path}. Raises ValueError for mixed types."""
        arrow = need("pyarrow", self.rows_path)
        import pyarrow.parquet

        image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
        try:
            schemas = [arrow.Table.from_pylist(batch).schema for batch in self._batches()]
            schema = arrow.unify_schemas(schemas, promote_options="permissive")
            if (place := schema.get_field_index("image")) >= 0:
                schema = schema.set(place, arrow.field("image", image))
            path = self.folder / "curated.parquet"
            making = path.with_suffix(".part")
            with pyarrow.parquet.ParquetWriter(making, schema) as writer:
                for batch in self._batches():
                    writer.write_table(arrow.Table.from_pylist([self._with_image(row) for row in batch], schema))
        except arrow.ArrowException as error:
            raise ValueError(f'{self.rows_path}: does not fit a table: {error}; use format = "jsonl"') from None
        making.replace(path)
        return path

    def _batches(self) -> Iterator[list[Row]]:
        """Where any row has several accepted answers, all have a list of them: a column has one type."""
        several = any(isinstance(row.get("answer"), list) for row in read_rows(self.rows_path))
        rows = read_rows(self.rows_path)
        while batch := list(islice(rows, BATCH_ROWS)):
            yield [_listed(row) if several else row for row in batch]

    def _with_image(self, row: Row) -> Row:
        if "image" not in row:
            return row
        return row | {"image": {"bytes": (self.folder / row["image"]).read_bytes(), "path": row["image"]}}


def _listed(row: Row) -> Row:
    answer = row["answer"]
    return row | {"answer": answer if isinstance(answer, list) else [answer]}


def _compare(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder}: was begun with {name} = {_short(found.get(name))}, not {_short(wanted.get(name))}; "
                "use another output, or delete it"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
