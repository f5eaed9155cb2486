"""The loggers of a run, opened by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from vtengine.config import to_dict
from vtengine_training.loggers.base import Guarded, Row
from vtengine_training.loggers.config import LoggerName, WandbConfig
from vtengine_training.loggers.jsonl import JsonLines
from vtengine_training.packages import is_installed

Report = Callable[[dict[str, Any]], None]
FAILED = "loggers/failed"


class Logged(Protocol):
    """What a configuration says of loggers."""

    @property
    def output(self) -> str: ...

    @property
    def loggers(self) -> tuple[LoggerName, ...]: ...

    @property
    def wandb(self) -> WandbConfig: ...


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raises ValueError for a logger whose package is missing: to be called before anything takes time."""
    for name in ("tensorboard", "wandb"):
        if name in names and not is_installed(name):
            raise ValueError(f"loggers: {name} is missing; pip install 'vtengine[{name}]', or leave it out")


@contextmanager
def open_loggers(config: Logged, total: int, done: int, note: Callable[[Row], str]) -> Iterator[Report]:
    """A function that takes a row to all loggers of the configuration. metrics.jsonl is always one, and the first.

    total, done: steps of the run, and of it so far. note: what the console says of a row. A logger that fails is
    warned of once, and its failures are counted in the rows that follow (loggers/failed). Raises ValueError where a
    logger cannot be opened, OSError where metrics.jsonl cannot be written.
    """
    output = Path(config.output)
    with ExitStack() as stack:
        record = JsonLines(output, done)
        stack.callback(record.close)
        guarded: list[Guarded] = []
        for name in dict.fromkeys(config.loggers):
            if name != "jsonl":
                guarded.append(Guarded(name, _open(name, config, output, total, done, note)))
                stack.callback(guarded[-1].close)

        def report(row: dict[str, Any]) -> None:
            failed = sum(one.num_failed for one in guarded)
            row = row | {FAILED: failed} if failed else row
            record.log(row)
            for one in guarded:
                one.log(row)

        yield report


def _open(name: LoggerName, config: Logged, output: Path, total: int, done: int, note: Callable[[Row], str]) -> Any:
    """Imports what the logger needs, and nothing for those that nobody wants."""
    if name == "tensorboard":
        from vtengine_training.loggers.tensorboard import TensorBoard

        return TensorBoard(output, done)
    if name == "wandb":
        from vtengine_training.loggers.wandb import Wandb

        return Wandb(output, config.wandb, to_dict(config))
    from vtengine_training.loggers.console import Console

    return Console(total, done, note)
