"""`vtengine measure`: levels of load on a file of questions, in rounds that take turns; a table, JSON, a picture."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from vtengine.cli.asking import check_image_root
from vtengine.cli.errors import INTERRUPTED, OK, ROWS_REJECTED, CliError, UsageError, one_line, reason
from vtengine.cli.inputs import InputRow, RejectedRow, read_inputs
from vtengine.cli.progress import Progress
from vtengine.cli.session import CONCURRENCY, check_flags, default_concurrency
from vtengine.cli.stop import Stop
from vtengine.protocol.messages import Resolution
from vtengine.viewer.totals import UNFINISHED

if TYPE_CHECKING:
    from vtengine.cli.measure_target import Target
    from vtengine.measure.figures import Level
    from vtengine.measure.load import Job, Row

WARM_UP = 16
"""Questions that are asked of each resolution before the clock runs: memory grows, kernels are compiled."""


def run(arguments: argparse.Namespace) -> int:
    """The whole command. Raises CliError for what ends it early; what was measured until then is told all the same."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    if arguments.chat is None:
        check_flags(arguments)
    else:
        from vtengine.cli.measure_target import check_chat_flags

        check_chat_flags(arguments)
    _check_places(arguments)
    task = Task.prepare(arguments)
    fault: CliError | None = None
    try:
        asyncio.run(_measure(task))
    except KeyboardInterrupt:
        fault = _interrupted(task, INTERRUPTED)
    except CliError as error:
        fault = error
    if measured := [level for level in task.levels if level.passes]:
        from vtengine.cli.measure_report import report

        report(task, measured, finished=fault is None)
    if fault is not None:
        raise fault
    return ROWS_REJECTED if task.lost else OK


@dataclass
class Task:
    """levels: in the order of the table. rows: of the input, as many as one pass or, where no question may come twice,
    all passes want. taken: of them, so far. model: as the target calls it. lost: questions that were rejected or
    failed. fault: what the first of them died of."""

    arguments: argparse.Namespace
    rows: list[InputRow]
    levels: list[Level]
    taken: int = 0
    model: str = ""
    lost: int = 0
    fault: str = ""

    @classmethod
    def prepare(cls, arguments: argparse.Namespace) -> Task:
        from vtengine.measure.figures import Level
        from vtengine.measure.load import Load

        at_most = _default_concurrency(arguments)
        counts = arguments.concurrency or ([] if arguments.rate else sorted({1, at_most // 4, at_most}))
        loads = [Load(concurrency=count) for count in counts] + [Load(rate_per_s=rate) for rate in arguments.rate or []]
        views = dict.fromkeys([arguments.resolution, arguments.against or arguments.resolution])
        levels = [Level(view, load) for load in loads for view in views]
        wanted = arguments.questions
        if arguments.chat is not None:
            wanted = WARM_UP * len(views) + wanted * len(levels) * arguments.rounds
        return cls(arguments, _questions(arguments, wanted), levels)

    @property
    def resolutions(self) -> list[Resolution]:
        return list(dict.fromkeys(level.resolution for level in self.levels))

    @property
    def concurrency(self) -> int:
        """Of the engine: the most that any level asks of it at a time, as far as that is known."""
        return max(level.load.concurrency or _default_concurrency(self.arguments) for level in self.levels)

    @property
    def num_questions(self) -> int:
        """Of a pass."""
        return min(self.arguments.questions, len(self.rows))

    def rounds(self) -> Iterator[Level]:
        """The levels, round by round, each round beginning with another one."""
        for number in range(self.arguments.rounds):
            shift = number % len(self.levels)
            yield from self.levels[shift:] + self.levels[:shift]

    def jobs(self, target: Target, resolution: Resolution, count: int, progress: Progress | None = None) -> list[Job]:
        """The next questions: the first ones again where that makes no difference."""
        begin = 0 if target.repeats else self.taken
        self.taken += count
        rows = [self.rows[(begin + index) % len(self.rows)] for index in range(count)]
        return [partial(self._ask, target, resolution, row, progress) for row in rows]

    async def _ask(self, target: Target, resolution: Resolution, row: InputRow, progress: Progress | None) -> Row:
        record = await target.ask(row, resolution)
        if record["status"] in UNFINISHED:
            self.lost += 1
            self.fault = self.fault or f"row {row.id!r}: {record['error']['code']}: {record['error']['message']}"
        if progress is not None:
            progress.advance(record["status"], record["upscaled"])
        return record


def _default_concurrency(arguments: argparse.Namespace) -> int:
    return default_concurrency(arguments) if arguments.chat is None else CONCURRENCY


def _check_places(arguments: argparse.Namespace) -> None:
    """Before anything takes time: can the results be written?"""
    check_image_root(arguments)
    for flag, path in (("-o", arguments.output), ("--rows", arguments.rows), ("--plot", arguments.plot)):
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(f"{flag} {path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"{flag} {path}: cannot be written: permission denied")
        if path.exists() and arguments.input.exists() and path.samefile(arguments.input):
            raise UsageError(f"{flag} {path}: is the input itself")
    if arguments.plot is not None:
        from vtengine.measure.picture import check_picture

        try:
            check_picture(arguments.plot)
        except ValueError as error:
            raise UsageError(f"--plot {arguments.plot}: {one_line(error)}") from None


def _questions(arguments: argparse.Namespace, wanted: int) -> list[InputRow]:
    """The first ones of the input; lines that cannot be asked are told of and left out. Raises UsageError."""
    try:
        lines = list(islice(read_inputs(arguments.input), wanted))
    except OSError as error:
        raise UsageError(f"{arguments.input}: cannot be read: {reason(error)}") from None
    rows = [line for line in lines if isinstance(line, InputRow)]
    wrong = next((line for line in lines if isinstance(line, RejectedRow)), None)
    about = "" if wrong is None else f" (line {wrong.line}: {wrong.message})"
    if not rows:
        raise UsageError(f"{arguments.input}: holds no question{about}")
    if wrong is not None:
        print(f"{arguments.input}: {len(lines) - len(rows):,} lines are left out{about}", file=sys.stderr)
    return rows


async def _measure(task: Task) -> None:
    from vtengine.cli.measure_target import open_target

    stop: Stop | None = None
    try:
        async with open_target(task.arguments, task.concurrency, task.resolutions) as target:
            stop = Stop()
            await _ask_all(task, target)
    except asyncio.CancelledError:
        if stop is None or stop.number is None:
            raise
        raise _interrupted(task, stop.status) from None


async def _ask_all(task: Task, target: Target) -> None:
    from vtengine.measure.load import run_load

    arguments, count = task.arguments, task.num_questions
    task.model = target.model
    _tell_of_repeats(task, target)
    for view in task.resolutions:
        await _warm_up(task, target, view)
    progress = Progress(count * len(task.levels) * arguments.rounds, 0, quiet=arguments.quiet)
    try:
        for level in task.rounds():
            await target.empty_caches()
            jobs = task.jobs(target, level.resolution, count, progress)
            level.passes.append(await run_load(level.load, jobs, arguments.seed))
    finally:
        progress.close()


def _interrupted(task: Task, status: int) -> CliError:
    whole = min(len(level.passes) for level in task.levels)
    return CliError(f"interrupted after {whole} of {task.arguments.rounds} whole rounds", status=status)


async def _warm_up(task: Task, target: Target, view: Resolution) -> None:
    """Raises CliError where all fail: the others would too."""
    jobs = task.jobs(target, view, min(WARM_UP, task.num_questions))
    await asyncio.gather(*(job() for job in jobs))
    if task.lost == len(jobs):
        raise CliError(f"the first {task.lost:,} questions all failed; the first of them, {task.fault}")
    task.lost, task.fault = 0, ""


def _tell_of_repeats(task: Task, target: Target) -> None:
    """Where a server may answer from its caches what it was asked before."""
    passes, asked = len(task.levels) * task.arguments.rounds, task.num_questions
    before = len(task.resolutions) * min(WARM_UP, asked)
    if target.repeats or before + passes * asked <= len(task.rows):
        return
    fit = max(0, len(task.rows) - before) // passes
    hint = f" (--questions {fit} asks none twice)" if fit else ""
    print(
        f"{task.arguments.input}: {passes} passes over {asked:,} questions each want more than its {len(task.rows):,}; "
        f"those that come again may be answered from the server's caches{hint}",
        file=sys.stderr,
    )
