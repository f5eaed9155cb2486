"""Runs the planned trainings as processes of their own, a few at a time. What is done is not done again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from vtengine_training.files import only_run_in
from vtengine_training.sweep.plan import Planned

POLL_S = 1.0
LOG = "log.txt"
DONE = "done.json"
PROGRAM = (sys.executable, "-m", "vtengine_training.cli")


@dataclass(frozen=True)
class Ended:
    """How a run ended. exit: its status; 0 = all steps done. note: its last words, where it is not 0."""

    name: str
    exit: int
    note: str = ""


def prepare(planned: Sequence[Planned]) -> None:
    """Writes every run's configuration. Raises ValueError for a run that was begun with another one."""
    for one in planned:
        if one.path.is_file() and one.path.read_text(encoding="utf-8") != one.config and one.folder.exists():
            raise ValueError(
                f"run {one.name}: was begun with other settings ({one.path}); delete {one.folder}, or change output"
            )
        one.path.parent.mkdir(parents=True, exist_ok=True)
        one.path.write_text(one.config, encoding="utf-8")


def is_done(one: Planned) -> bool:
    """Whether an earlier call finished it."""
    return (one.folder / DONE).is_file()


def steps_done(one: Planned) -> int:
    """Steps in its metrics so far."""
    if is_done(one):
        return one.steps
    try:
        lines = (one.folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return min(one.steps, int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return 0


async def run_all(
    planned: Sequence[Planned], command: str, jobs: int, on_poll: Callable[[], None], on_end: Callable[[Ended], None]
) -> list[Ended]:
    """Every run that is not done, at most `jobs` at a time, in order. A run that fails does not stop the others.

    The jobs share the GPUs, where there are any, evenly; where there are more jobs than GPUs, they take turns.
    Cancelling sends SIGTERM to those under way (they save and end) and waits for them.
    """
    free: asyncio.Queue[str | None] = asyncio.Queue()
    for gpus in shares(visible_gpus(), jobs):
        free.put_nowait(gpus)

    async def go(one: Planned) -> Ended:
        gpus = await free.get()
        try:
            ended = Ended(one.name, 0) if is_done(one) else await _run(one, command, gpus)
        finally:
            free.put_nowait(gpus)
        on_end(ended)
        return ended

    async def poll() -> None:
        while True:
            on_poll()
            await asyncio.sleep(POLL_S)

    tasks = [asyncio.create_task(go(one)) for one in planned]
    polling = asyncio.create_task(poll())
    try:
        await asyncio.wait(tasks)
        return [task.result() for task in tasks]
    finally:
        for task in (polling, *tasks):
            task.cancel()
        await asyncio.gather(polling, *tasks, return_exceptions=True)
        on_poll()


def shares(gpus: Sequence[str], jobs: int) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is to say in each job; None: what it says already."""
    return [",".join(gpus[job::jobs] or gpus[job % len(gpus) :][:1]) if gpus else None for job in range(jobs)]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        names = (name.strip() for name in said.split(","))
        return list(takewhile(lambda name: name not in ("", "-1"), names))  # CUDA reads no further either
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


async def _run(one: Planned, command: str, gpus: str | None) -> Ended:
    """The training in a fresh interpreter, which keeps threads, memory and crashes apart."""
    try:
        with only_run_in(one.folder):
            pass
    except ValueError as error:  # of a sweep that was killed, for one: it goes on alone, and writes to the log
        return Ended(one.name, 2, str(error))
    roots = [str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(roots))}
    environment |= {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    with (one.folder / LOG).open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(*PROGRAM, command, str(one.path)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            status = await process.wait()
        except asyncio.CancelledError:
            process.send_signal(signal.SIGTERM)
            await process.wait()
            raise
    if status == 0:
        (one.folder / DONE).write_text(json.dumps({"steps": one.steps}) + "\n", encoding="utf-8")
        return Ended(one.name, 0)
    return Ended(one.name, status, last_words(one.folder / LOG))


def last_words(log: Path) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")
