"""A `Backend` in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtengine.engine.base import BackendFailed, Completion, OnTokens, Request, RequestRejected
from vtengine.engine.processes.wire import (
    Head,
    Mirrored,
    describe,
    on_cpu,
    pack_request,
    read_frame,
    unpack_completion,
    write_frame,
)
from vtengine.engine.waiting import set_error, set_result, tell

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLOSE_S = 30.0
"""For an engine to end its step; then its process is killed."""


log = logging.getLogger(__name__)


class EngineLost(BackendFailed):
    """The process has ended; it serves nothing any more."""


@dataclass
class _Call:
    """Who waits for an answer, and who is told of tokens."""

    answer: asyncio.Future[Head]
    on_tokens: OnTokens | None = None


class EngineProcess:
    """Belongs to one event loop. The process starts at once; `check` waits until the engine in it is there.

    make: "package.module:function", called in the process with `options` (what JSON can say); returns the `Backend`.
    environment: of the process, over this one's. name: for messages.
    """

    def __init__(
        self, make: str, options: Mapping[str, Any], name: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._line, theirs = socket.socketpair()
        path = {"PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
        with theirs:
            # -P: nothing is imported from the folder that somebody works in, unless this process would
            command = [sys.executable, "-P", "-m", "vtengine.engine.processes.host", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,  # the owner's own output may be a table or rows
                pass_fds=[theirs.fileno()],
                env=os.environ | path | dict(environment or {}),
                start_new_session=True,  # Ctrl-C is for the owner, which then ends what runs here
            )
        self._frames: queue.SimpleQueue[tuple[Head, Sequence[Tensor]] | None] = queue.SimpleQueue()
        self._frames.put(({"make": make, "options": dict(options)}, ()))
        self._images: Mirrored[bool] = Mirrored()
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count()
        self._stats: dict[str, float] = {}
        self._ready: asyncio.Future[None] | None = None
        self.num_running = 0
        """Requests that were given to this engine and have not ended."""
        self.is_lost = False

    async def check(self) -> None:
        """Waits for the engine. Raises ValueError, RequestRejected or BackendFailed as making it did."""
        loop = asyncio.get_running_loop()
        if self._ready is None:
            self._ready = loop.create_future()
            for work in (self._write, partial(self._read, loop)):
                threading.Thread(target=work, name=f"vtengine {self.name}", daemon=True).start()
        if self._ready.get_loop() is not loop:
            raise RuntimeError(f"engine {self.name}: belongs to the event loop that used it first; use that one")
        await asyncio.shield(self._ready)

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        self.num_running += 1
        try:
            await self.check()
            packed, pixels = pack_request(request, self._images)
            head = {"what": "generate", "request": packed, "streams": on_tokens is not None}
            return unpack_completion((await self._call(head, pixels, on_tokens))["completion"])
        finally:
            self.num_running -= 1

    async def load_weights(self, source: Path | Mapping[str, torch.Tensor], version: int) -> None:
        await self.check()
        head: Head = {"what": "load_weights", "version": version, "path": None, "tensors": []}
        tensors: list[Tensor] = []
        if isinstance(source, str | Path):
            head["path"] = str(source)
        else:
            tensors = await asyncio.to_thread(on_cpu, source.values())
            head["tensors"] = [(name, describe(tensor)) for name, tensor in zip(source, tensors, strict=True)]
        await self._call(head, tensors)

    def stats(self) -> dict[str, float]:
        """As they were a second ago or later; cpu_s: of all threads of its process, when the others last changed."""
        return dict(self._stats)

    async def close(self) -> None:
        """Ends the process; what still runs in it raises EngineLost."""
        self._frames.put(None)
        self._hang_up()
        if self._ready is None or not self._ready.done():  # it listens once its model is loaded, and has nothing to end
            self._process.kill()
        try:
            await asyncio.to_thread(self._process.wait, CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        self._lost()
        self._line.close()

    async def _call(self, head: Head, tensors: Sequence[Tensor], on_tokens: OnTokens | None = None) -> Head:
        if self.is_lost:
            raise self._fault()
        number = next(self._numbers)
        call = self._calls[number] = _Call(asyncio.get_running_loop().create_future(), on_tokens)
        self._frames.put((head | {"call": number, "sent_s": time.perf_counter()}, tensors))
        try:
            return await call.answer
        finally:
            if self._calls.pop(number, None) is not None:  # the caller leaves before the end
                self._frames.put(({"what": "cancel", "call": number}, ()))

    def _write(self) -> None:
        """In a thread: pixels of large images take their time."""
        try:
            while (frame := self._frames.get()) is not None:
                write_frame(self._line, *frame)
        except OSError:
            pass  # told by the reading side
        except Exception:
            log.exception("engine %s: a frame could not be made", self.name)
        finally:
            self._hang_up()  # a frame that is missing puts both sides out of step

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while (frame := read_frame(self._line)) is not None:
                loop.call_soon_threadsafe(self._take, frame[0])
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more
        finally:
            self._hang_up()
            self._process.wait()
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._lost)

    def _hang_up(self) -> None:
        """Which ends the process."""
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)

    def _take(self, head: Head) -> None:
        self._stats = head["stats"] or self._stats
        for event in head["events"]:
            what, call = event["event"], self._calls.get(event.get("call", -1))
            if what == "ready" and self._ready is not None:
                set_result(self._ready, None)
            elif what == "unready":
                self._not_ready(_error(event))
            elif call is None:
                continue
            elif what == "tokens" and call.on_tokens is not None:
                tell(call.answer, call.on_tokens, event["token_ids"])
            elif what == "failed":
                set_error(self._calls.pop(event["call"]).answer, _error(event))
            elif what == "done":
                set_result(self._calls.pop(event["call"]).answer, event)

    def _fault(self) -> EngineLost:
        status = self._process.returncode
        return EngineLost(f"engine {self.name}: its process has ended (status {status}); its log tells why")

    def _lost(self) -> None:
        self.is_lost = True
        calls, self._calls = self._calls, {}
        self._not_ready(self._fault())
        for call in calls.values():
            set_error(call.answer, self._fault())

    def _not_ready(self, error: Exception) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # seen: perhaps nobody waits any more


def _error(event: Head) -> Exception:
    kind, message = event["kind"], event["message"]
    if kind == "rejected":
        return RequestRejected(event["code"], message, event["blame"])
    return ValueError(message) if kind == "value" else BackendFailed(message)
