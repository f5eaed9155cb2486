"""What `vtengine measure` found: a table, and the files that were asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtengine.cli.errors import CliError, reason
from vtengine.cli.measure_table import print_levels
from vtengine.cli.session import sampling_settings
from vtengine.stamp import stamp

if TYPE_CHECKING:
    from vtengine.cli.measure import Task
    from vtengine.measure.figures import Level


def report(task: Task, measured: list[Level], finished: bool) -> None:
    """Raises CliError where a file cannot be written: the table is there by then."""
    from vtengine.measure.figures import figures

    arguments, found = task.arguments, [figures(level) for level in measured]
    print_levels(found)
    if lost := sum(level["unfinished"] for level in found):
        print(f"{lost:,} questions were rejected or failed and are in no other figure; the first: {task.fault}")
    for path, write in (
        (arguments.output, lambda path: _write_figures(path, task, found, finished)),
        (arguments.rows, lambda path: _write_rows(path, measured)),
        (arguments.plot, lambda path: _draw(path, found)),
    ):
        try:
            if path is not None:
                write(path)
        except OSError as error:
            raise CliError(f"{path}: cannot be written: {reason(error)}") from None


def _write_figures(path: Path, task: Task, found: list[dict[str, Any]], finished: bool) -> None:
    where = stamp(Path(__file__).parent)
    result = {"stamp": where, "settings": _settings(task), "finished": finished, "levels": found}
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _write_rows(path: Path, measured: list[Level]) -> None:
    """level: its place in the table, from 0; round: from 0. Two rows of one question differ in these."""
    from vtengine.rollout.records import encode_row

    with path.open("wb") as file:
        for number, level in enumerate(measured):
            for turn, one in enumerate(level.passes):
                file.writelines(encode_row({"level": number, "round": turn} | row) for row in one.rows)


def _draw(path: Path, found: list[dict[str, Any]]) -> None:
    from vtengine.measure.picture import draw

    draw(found, path)


def _settings(task: Task) -> dict[str, Any]:
    """Without those that a chat server does not hear."""
    from vtengine.cli.measure_target import OF_ENGINES

    arguments = task.arguments
    names = ("chat", "questions", "rounds", "concurrency", "rate", "against", "data_parallel", "kv_gb", "device")
    settings = {"input": str(arguments.input)} | sampling_settings(arguments) | {"model": task.model}
    settings |= {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in settings.items() if arguments.chat is None or name not in OF_ENGINES}
