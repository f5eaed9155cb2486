"""The worker thread: carries out what was posted to it, then makes a step, for as long as there is something to do."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from vtengine.engine.base import BackendFailed
from vtengine.engine.embedded.encoder import ImagesTooLarge
from vtengine.engine.waiting import set_error, set_result
from vtengine.model import load_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtengine.engine.embedded.answers import Answers
    from vtengine.engine.embedded.caller import Outbox
    from vtengine.engine.embedded.encode_ahead import EncodeAhead
    from vtengine.engine.embedded.runner import Flight, Runner
    from vtengine.engine.embedded.scheduler import Row, Scheduler
    from vtengine.engine.embedded.sequence import Sequence


@dataclass(frozen=True)
class Update:
    """New weights, by checkpoint name, and who waits for them."""

    tensors: dict[str, torch.Tensor]
    version: int
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]


class Worker:
    """Scheduler, runner and answers belong to this thread; others `post` what is to be done with them."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, ahead: EncodeAhead, answers: Answers, outbox: Outbox,
        overlap: bool, num_threads: int | None = None,
    ) -> None:  # fmt: skip
        """overlap: see `step`."""
        self.scheduler, self.runner, self.ahead, self.answers = scheduler, runner, ahead, answers
        self.updates: deque[Update] = deque()
        self.device = runner.model.device
        self.thread = threading.Thread(target=self.serve, name="vtengine-engine", daemon=True)
        self.is_closed = False
        self._outbox, self._overlap, self._num_threads = outbox, overlap, num_threads
        self._flight: Flight | None = None  # launched, and not taken in yet
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._begun = threading.Event()
        self._unready: Exception | None = None

    def start(self) -> None:
        """Raises what keeps passes from running at all, such as a GPU without memory for them."""
        self.thread.start()
        atexit.register(self.close)  # torch aborts the process if Python ends a thread inside of it
        self._begun.wait()  # a synchronisation of the GPU by who made the engine would break a capture
        if self._unready is not None:
            self.close()
            raise self._unready

    def post(self, command: Callable[[], None]) -> None:
        """To be carried out between two steps. Raises BackendFailed once closed."""
        with self._wake:
            if self.is_closed:
                raise BackendFailed("the engine is closed")
            self._commands.append(command)
            self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self.is_closed = True
            self._wake.notify()
        self.thread.join()
        atexit.unregister(self.close)

    # ---- in the thread ----------------------------------------------------------------------------------------------

    def enqueue(self, sequence: Sequence) -> None:
        self.ahead.hold(sequence)
        self.scheduler.submit(sequence)

    def serve(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        if self.device.type == "cuda":  # a new thread begins on the first GPU
            torch.cuda.set_device(self.device)
        fault: Exception | None = None
        try:
            self._warm_up()
            while self._unready is None and self._take_commands():
                try:
                    self.step()
                except Exception as error:
                    fault = error
                    self.answers.fail_all(error)
                    self._forget()
                    fault = None
                self._outbox.deliver()
        finally:  # with a fault where a GPU is lost: its caches cannot even be emptied, but nobody waits for ever
            self._begun.set()
            with self._wake:
                self.is_closed = True
            self._take_commands()
            self.answers.fail_all(fault)
            self.ahead.close()
            for update in self.updates:
                closed = BackendFailed("the engine was closed")
                self._outbox.add(update.loop, partial(set_error, update.done, closed))
            self._outbox.deliver()
        self._forget()

    def _warm_up(self) -> None:
        try:
            self.runner.warm_up()
        except Exception as error:
            self._unready = error
        self._begun.set()

    def _take_commands(self) -> bool:
        """Carries out what was posted, waiting if there is nothing to do; False once closed."""
        with self._wake:
            while not self.is_closed and not self._commands and not self._is_busy:
                self._wake.wait()
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        return not self.is_closed

    @property
    def _is_busy(self) -> bool:
        return bool(not self.scheduler.idle or self.updates or self._flight)

    def step(self) -> None:
        """Schedule, launch, take in: one forward pass.

        Overlapping, the pass that is taken in is the one before: while this one runs, the host does all the rest.
        """
        if self._flight is not None and self.scheduler.must_preempt:
            self._land()
        rows = self._schedule()
        if not rows and self._flight is None and self.updates:
            self._update(self.updates.popleft())
        launched = self._launch(rows) if rows else None
        self._land()
        self._flight = launched
        if not self._overlap:
            self._land()

    def _schedule(self) -> list[Row]:
        alone, admit = not self.scheduler.running, not self.updates
        self.ahead.collect(wait=alone)
        rows = self.scheduler.schedule(admit, held=alone and not self.ahead.is_busy)
        if rows and admit:
            self.ahead.begin()
        return rows

    def _launch(self, rows: list[Row]) -> Flight | None:
        """None: the pass came to nothing."""
        try:
            flight = self.runner.launch(rows)
        except ImagesTooLarge as error:
            self._land()  # who begins again must know what it has sampled
            self.scheduler.restart(without=error.sequences)
            self.answers.fail(error.sequences, str(error), error)
            return None
        self.scheduler.launched(rows)
        return flight

    def _land(self) -> None:
        """Takes in what was launched, if anything was: waits for it, and its tokens become known."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self.answers.commit(flight.rows, *flight.sampled.wait())

    def _update(self, update: Update) -> None:
        """Only while nothing runs. A failed update leaves weights and caches as they are."""
        self.ahead.forget()
        try:
            load_tensors(self.runner.model, update.tensors, partial=True)
        except Exception as error:
            self._outbox.add(update.loop, partial(set_error, update.done, error))
            return
        self.scheduler.tree.clear()
        self.runner.forget()
        self.runner.encoder.weight_version = update.version
        for sequence in self.scheduler.waiting:
            sequence.features.clear()
            self.ahead.hold(sequence)
        self._outbox.add(update.loop, partial(set_result, update.done, None))

    def _forget(self) -> None:
        self._flight = None
        self.runner.forget()
        self.ahead.forget()
