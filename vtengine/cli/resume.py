"""What `--resume` finds: rows that stay where they are, and good rows behind a failed one, which are taken over.

A row with status `failed` (server down, engine broken, image out of reach) is tried again, and one that the engine had
no room for, since it may have more now; every other row is final.
Rows are written in input order, so from the first failed row on the output is written anew. The good rows behind it
wait meanwhile in `OUT.jsonl.kept`, written whole before the output is cut: the two files together always hold all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtengine.cli.errors import CliError, UsageError, one_line
from vtengine.cli.inputs import RESERVED_KEYS, InputRow, RejectedRow
from vtengine.cli.output import complete_rows, kept_path

Row = dict[str, Any]
NO_ROOM = "request_too_large"
"""Code of a request that needs more keys and values than the engine holds (`--kv-gb`)."""
Place = tuple[InputRow | RejectedRow, int]
"""An input and the index of a sample of it; places are numbered from 0 in the order of the output."""


class KeptRows:
    """Rows by the number of their place, read from the files that hold them; `save` makes one file of their own.

    That file is JSON lines of [place, row].
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._spans: dict[int, tuple[Path, int, int]] = {}

    def __len__(self) -> int:
        return len(self._spans)

    def add(self, place: int, file: Path, start: int, end: int) -> None:
        """The row of a place is the line at bytes start..end of a file, as a row or as [place, row]."""
        self._spans[place] = file, start, end

    def get(self, place: int) -> Row | None:
        if place not in self._spans:
            return None
        file, start, end = self._spans[place]
        with file.open("rb") as opened:
            opened.seek(start)
            record = json.loads(opened.read(end - start))
        row: Row = record[1] if isinstance(record, list) else record
        return row

    def save(self) -> None:
        """Writes the file and renames it into place. CliError: the disk is full; an older file is as it was."""
        fresh = self.path.with_name(self.path.name + ".new")
        moved: dict[int, tuple[Path, int, int]] = {}
        try:
            with fresh.open("wb") as file:
                for place in sorted(self._spans):
                    start = file.tell()
                    file.write(json.dumps([place, self.get(place)]).encode() + b"\n")
                    moved[place] = self.path, start, file.tell()
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise CliError(f"{self.path}: writing failed: {one_line(error)}; free some space, then try again") from None
        self._spans = moved

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass
class Found:
    """The first `stay` rows of the output, up to byte `end`, stay there; `kept` are good rows behind a failed one."""

    kept: KeptRows
    stay: int = 0
    end: int = 0


def find_rows(
    output: Path, source: Path, places: Callable[[], Iterator[Place]], samples: int, on_stay: Callable[[Row], None]
) -> Found:
    """Reads what an earlier run left, question by question of `samples` rows; the rest of a torn question is dropped.

    on_stay: called with each row that stays. UsageError: these are not the first rows of this input.
    """
    found = Found(KeptRows(kept_path(output)))
    waiting = places()
    group: list[tuple[Row, int, int]] = []
    start = done = 0
    for row, end in complete_rows(output):
        place = next(waiting, None)
        if place is None:
            raise UsageError(f"--resume {output}: has more rows than {source} gives")
        _check_place(output, row, place, source)
        group.append((row, start, end))
        start = end
        if len(group) == samples:
            for member, begin, end in group:
                _sort_in(found, done, member, output, begin, end, on_stay)
                done += 1
            group.clear()
    _add_kept(found.kept, done, enumerate(places()), output, source)
    return found


def _sort_in(
    found: Found, place: int, row: Row, output: Path, begin: int, end: int, on_stay: Callable[[Row], None]
) -> None:
    if row.get("status") == "failed" or (row.get("error") or {}).get("code") == NO_ROOM:
        return
    if place == found.stay:
        found.stay, found.end = place + 1, end
        on_stay(row)
    else:
        found.kept.add(place, output, begin, end)


def _add_kept(kept: KeptRows, done: int, places: Iterator[tuple[int, Place]], output: Path, source: Path) -> None:
    """Adds the rows that an interrupted second try had put aside, for places that the output has not reached."""
    if not kept.path.is_file():
        return
    start, last = 0, -1
    with kept.path.open("rb") as file:
        for line in file:
            try:
                number, row = json.loads(line)
            except (ValueError, TypeError):
                raise UsageError(
                    f"--resume {output}: {kept.path} is damaged; move it away to go on without it"
                ) from None
            if number >= done:
                place = next((place for index, place in places if index == number), None)
                if place is None or number <= last:
                    raise UsageError(f"--resume {output}: {kept.path} has rows that {source} does not give")
                _check_place(output, row, place, source)
                kept.add(number, kept.path, start, start + len(line))
            start, last = start + len(line), number


def _check_place(output: Path, row: Row, place: Place, source: Path) -> None:
    """Raises UsageError when a row of an earlier run was made from another line than the input has here now."""
    line, sample = place
    if (row.get("id"), row.get("sample")) != (line.id, sample):
        has = f"id {row.get('id')!r}, sample {row.get('sample')!r}"
        raise UsageError(f"--resume {output}: has {has} where {source} gives id {line.id!r}, sample {sample}")
    wanted = dict(line.carried)
    if isinstance(line, InputRow):
        wanted["expected"] = list(line.answers) or None
    gone = row.keys() - wanted.keys() - RESERVED_KEYS - {"id", "answer"}  # a row without its image is another question
    changed = [key for key in (*wanted, *sorted(gone)) if row.get(key) != wanted.get(key)]
    if changed:
        raise UsageError(f"--resume {output}: the input has changed: {changed[0]!r} of id {line.id!r} is another")
