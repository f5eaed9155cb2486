"""`vtengine generate`: a file of questions in, a row per (question, sample) out, in input order, resumable.

A resumed run gives the file of an uninterrupted one, apart from times, and tries rows that failed again. Where several
samples or questions share an image, or questions begin alike, which of them found it in the cache (cached, prefill,
encoded) depends on who reached the engine first.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vtengine.cli.asking import Row, answer_row, check_image_root
from vtengine.cli.errors import OK, ROWS_REJECTED, CliError, UsageError, reason
from vtengine.cli.inputs import InputRow, RejectedRow, count_inputs, first_rejection, read_inputs
from vtengine.cli.output import OutputFile, check_free, check_settings, kept_path, settings_path
from vtengine.cli.progress import Progress
from vtengine.cli.resume import NO_ROOM, KeptRows, Place, find_rows
from vtengine.cli.session import check_flags, default_concurrency, open_session, sampling_settings
from vtengine.cli.stop import Stop
from vtengine.cli.summary import print_summary
from vtengine.viewer.totals import TotalsCounter
from vtengine.vision.source import is_url

if TYPE_CHECKING:
    from vtengine.rollout.group import Setting


def run(arguments: argparse.Namespace) -> int:
    """The whole command. Raises CliError for what ends it early."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    check_flags(arguments)
    task = _Task.prepare(arguments)
    if arguments.n > 1 and arguments.temperature == 0 and not arguments.quiet:
        print(f"--n {arguments.n}: greedy samples are all the same; --temperature 1 makes them differ", file=sys.stderr)
    started_s = time.monotonic()
    if task.rows_done < task.rows_total:
        asyncio.run(_generate(task, arguments.concurrency or default_concurrency(arguments)))
    else:
        task.close_output(task.open_output(), finished=True)
    wall_s = time.monotonic() - started_s
    totals = task.counter.totals()
    if not arguments.quiet:
        tokens = totals.completion_tokens - task.tokens_before
        stream = sys.stdout if task.writes_file else sys.stderr
        print_summary(totals, task.run_s or wall_s, task.rows_fresh, tokens, stream)
        if task.writes_file and (failed := dict(totals.statuses).get("failed")):
            print(f"{failed:,} failed: run the same command with --resume to try them again", file=sys.stderr)
    return ROWS_REJECTED if totals.unfinished else OK


@dataclass
class _Task:
    """What is to be done: `rows_done` of `rows_total` are in the output already, up to byte `resume_at`.

    kept: rows to come that an earlier run has made. tokens_before: sampled by earlier runs.
    """

    arguments: argparse.Namespace
    counter: TotalsCounter
    rows_total: int
    rows_done: int = 0
    resume_at: int | None = None
    tokens_before: int = 0
    run_s: float = 0.0
    kept: KeptRows | None = None

    @classmethod
    def prepare(cls, arguments: argparse.Namespace) -> _Task:
        """Counts the rows of the input, and reads what an interrupted run left."""
        source, target = arguments.input, arguments.output
        _check_files(source, target)
        check_free(target)
        check_image_root(arguments)
        try:
            task = cls(arguments, TotalsCounter(), count_inputs(source) * arguments.n)
            wrong = first_rejection(source)
        except OSError as error:
            raise UsageError(f"{source}: cannot be read: {reason(error)}") from None
        if wrong is not None:
            about = f"no line of it is a JSON object (line {wrong.line}: {wrong.message})"
            raise UsageError(f"{source}: {about}; write one for each question, in UTF-8")
        if arguments.resume and target.is_file():
            check_settings(target, sampling_settings(arguments))
            found = find_rows(target, source, task.places, arguments.n, task.counter.add)
            task.rows_done, task.resume_at, task.kept = found.stay, found.end, found.kept
            task.tokens_before = task.counter.totals().completion_tokens
            task._tell_of_settings()
        return task

    def _tell_of_settings(self) -> None:
        """A run that was finished has left none to compare with; the input may have grown since."""
        target = self.arguments.output
        if self.rows_done and self.rows_fresh and not settings_path(target).exists() and not self.arguments.quiet:
            about = "the run that made its rows was finished, so that its settings are not known"
            print(f"{target}: {about}; new rows are made with those given now", file=sys.stderr)

    @property
    def writes_file(self) -> bool:
        return not self.arguments.output.exists() or self.arguments.output.is_file()

    @property
    def rows_fresh(self) -> int:
        """Rows that this run makes."""
        return self.rows_total - self.rows_done - (len(self.kept) if self.kept else 0)

    def places(self) -> Iterator[Place]:
        """Every (input, sample) in order."""
        for row in read_inputs(self.arguments.input):
            for sample in range(self.arguments.n):
                yield row, sample

    def open_output(self) -> OutputFile:
        check_free(self.arguments.output)  # the model took its time to load
        if self.kept:
            self.kept.save()
        target = self.arguments.output
        output = OutputFile(target, sampling_settings(self.arguments), resume_at=self.resume_at)
        if output.previous is not None and not self.arguments.quiet:
            unfinished = settings_path(output.previous).exists()
            hint = " (of a run that was not finished; --resume goes on with one)" if unfinished else ""
            print(f"{target}: the older file{hint} is now {output.previous}", file=sys.stderr)
        return output

    def close_output(self, output: OutputFile, *, finished: bool) -> None:
        """finished: every row was written; rows that are tried again leave something to resume."""
        totals = self.counter.totals()
        output.close(finished=finished and "failed" not in dict(totals.statuses) and NO_ROOM not in dict(totals.codes))
        if finished and self.kept is not None:
            self.kept.remove()


def _check_files(source: Path, target: Path) -> None:
    """The input is read twice and must outlive the run: no pipe, and none of the files that a run writes."""
    if str(source) == "-" or (source.exists() and not source.is_file() and not source.is_dir()):
        raise UsageError(f"{source}: is not a regular file; the input is read twice, so save it to a file first")
    if str(target) == "-":
        raise UsageError("-o -: name a file, or /dev/stdout")
    for path in (target, settings_path(target), kept_path(target)):
        if path.exists() and source.exists() and path.samefile(source):
            written = "the input itself" if path == target else f"written together with {path}, which is the input"
            raise UsageError(f"-o {target}: is {written}")


async def _generate(task: _Task, concurrency: int) -> None:
    """Runs what is left and writes it. Ctrl-C or a termination signal leaves a file that can be resumed."""
    stop: Stop | None = None
    output: OutputFile | None = None
    finished = False
    try:
        async with open_session(task.arguments, concurrency) as setting:
            stop = Stop()
            output = task.open_output()
            await _write_rows(task, setting, concurrency, output)
        finished = True
    except asyncio.CancelledError:
        if stop is None or stop.number is None:
            raise
        raise _interrupted(task, stop.status) from None
    finally:
        if output is not None:
            task.close_output(output, finished=finished)


async def _write_rows(task: _Task, setting: Setting, concurrency: int, output: OutputFile) -> None:
    from vtengine.rollout.group import in_order

    arguments = task.arguments
    progress = Progress(task.rows_total, task.rows_done, quiet=arguments.quiet)
    started_s = time.monotonic()
    places = islice(enumerate(task.places()), task.rows_done, None)
    jobs = (partial(_row, task, setting, number, *place) for number, place in places)
    try:
        rows = cast("AsyncGenerator[Row, None]", in_order(jobs, concurrency))
        async with aclosing(rows):
            async for row in rows:
                output.append(row)
                task.counter.add(row)
                progress.advance(row["status"], row["upscaled"])
    finally:
        task.run_s = time.monotonic() - started_s
        progress.close()


async def _row(task: _Task, setting: Setting, number: int, row: InputRow | RejectedRow, sample: int) -> Row:
    """One row of the output, the one that an earlier run made where there is one."""
    from vtengine.protocol.messages import ErrorInfo
    from vtengine.rollout.records import rejected_row

    arguments = task.arguments
    kept = task.kept.get(number) if task.kept else None
    if kept is not None:
        task.tokens_before += sum(turn["completion_tokens"] for turn in kept["turns"])
        return kept
    if isinstance(row, RejectedRow):
        return rejected_row(row.id, sample, ErrorInfo(row.code, row.message), row.carried)
    record, has_image = await answer_row(arguments, setting, row, sample)
    if row.image is not None and has_image and not is_url(row.image):
        path = os.path.abspath(arguments.input.parent / row.image)
        record["image_path"] = Path(os.path.relpath(path, os.path.abspath(arguments.output.parent))).as_posix()
    return record


def _interrupted(task: _Task, status: int) -> CliError:
    rows = task.counter.totals().rows
    message = f"interrupted: {rows} of {task.rows_total} rows are in {task.arguments.output};"
    return CliError(f"{message} run the same command with --resume to go on", status=status)
