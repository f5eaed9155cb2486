"""`python -m vtengine.engine.processes.host FD`: an engine, and the line to the process that owns it.

The first frame names a function that makes the engine. The end of the line ends the process, so that none is left
behind by an owner that was killed.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vtengine.engine.base import Backend, BackendFailed, Request, RequestRejected
from vtengine.engine.processes.wire import (
    Head,
    Mirrored,
    pack_completion,
    read_frame,
    tensor_of,
    unpack_request,
    write_frame,
)

STATS_S = 1.0
"""How old figures get that have changed since: what ends because its caller left is no event."""

log = logging.getLogger(__name__)


class Host:
    """Carries out frames in the event loop; what a turn of the loop has for the owner leaves as one frame."""

    def __init__(self, backend: Backend, line: socket.socket) -> None:
        self._backend, self._line = backend, line
        self._loop = asyncio.get_running_loop()
        self._images: Mirrored[Tensor] = Mirrored()
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._events: list[Head] = []
        self._told: Mapping[str, float] = {}
        self._ended = asyncio.Event()
        self.is_broken = False

    async def serve(self) -> None:
        """Until the owner is gone, or the engine can serve no more (`is_broken`)."""
        threading.Thread(target=self._read, name="vtengine-line", daemon=True).start()
        self._tell({"event": "ready"})
        while not self._ended.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), STATS_S)
            if self._backend.stats() != self._told:
                self._flush()
        for call in self._calls.values():
            call.cancel()
        await asyncio.gather(*self._calls.values(), return_exceptions=True)

    def _read(self) -> None:
        try:
            while (frame := read_frame(self._line)) is not None:
                self._loop.call_soon_threadsafe(self._take, *frame)
        finally:
            with suppress(RuntimeError):  # the loop is closed: it has ended already
                self._loop.call_soon_threadsafe(self._ended.set)

    def _take(self, head: Head, blobs: Sequence[bytearray]) -> None:
        """A frame that cannot be understood ends the process: both sides hold other images from there on."""
        try:
            self._begin(head["call"], head, blobs)
        except Exception:
            log.exception("frame %s", head["what"])
            self._break()

    def _begin(self, call: int, head: Head, blobs: Sequence[bytearray]) -> None:
        what = head["what"]
        if what == "cancel":
            if call in self._calls:
                self._calls[call].cancel()
            return
        work: Callable[[], Awaitable[Head]]
        if what == "generate":
            request = unpack_request(head["request"], blobs, self._images)  # at once: the order of frames matters
            waited_s = time.perf_counter() - head["sent_s"]
            work = partial(self._generate, call, request, head["streams"], waited_s)
        else:
            tensors = {name: tensor_of(of, blob) for (name, of), blob in zip(head["tensors"], blobs, strict=True)}
            source = Path(head["path"]) if head["path"] is not None else tensors
            work = partial(self._load_weights, source, head["version"])
        self._calls[call] = self._loop.create_task(self._run(call, work))
        self._calls[call].add_done_callback(lambda _: self._calls.pop(call))

    async def _generate(self, call: int, request: Request, streams: bool, waited_s: float) -> Head:
        def on_tokens(token_ids: Sequence[int]) -> None:
            self._tell({"event": "tokens", "call": call, "token_ids": list(token_ids)})

        completion = await self._backend.generate(request, on_tokens if streams else None)
        return {"completion": pack_completion(completion, waited_s)}

    async def _load_weights(self, source: Path | dict[str, Tensor], version: int) -> Head:
        await self._backend.load_weights(source, version)
        return {}

    async def _run(self, call: int, work: Callable[[], Awaitable[Head]]) -> None:
        try:
            self._tell({"event": "done", "call": call} | await work())
        except Exception as error:
            self._tell({"event": "failed", "call": call} | _fault(error))
            if getattr(self._backend, "is_closed", False):  # a lost GPU, say: another process may find it again
                self._loop.call_soon(self._break)

    def _break(self) -> None:
        self.is_broken = True
        self._ended.set()

    def _tell(self, event: Head) -> None:
        if not self._events:
            self._loop.call_soon(self._flush)
        self._events.append(event)

    def _flush(self) -> None:
        events, self._events = self._events, []
        try:
            self._told = self._backend.stats()
            stats = {**self._told, "cpu_s": time.process_time()}
            write_frame(self._line, {"events": events, "stats": stats})
        except OSError:
            self._ended.set()
        except Exception:
            log.exception("%d events", len(events))
            self._break()


def _fault(error: Exception) -> Head:
    """By the kinds that a `Backend` raises."""
    if isinstance(error, RequestRejected):
        return {"kind": "rejected", "code": error.code, "message": str(error), "blame": error.blame}
    if isinstance(error, BackendFailed):
        return {"kind": "failed", "message": str(error)}
    if isinstance(error, ValueError):
        return {"kind": "value", "message": str(error)}
    return {"kind": "failed", "message": f"{type(error).__name__}: {error}"}


def _end_with_owner(line: socket.socket, is_made: threading.Event) -> None:
    """In a thread: to load a large model takes minutes, for which an owner that was killed does not wait."""
    try:
        is_gone = not line.recv(1, socket.MSG_PEEK)
    except OSError:
        is_gone = True
    if is_gone and not is_made.is_set():
        os._exit(1)


async def _serve(make: Any, options: Head, line: socket.socket) -> int:
    is_made = threading.Event()
    threading.Thread(target=_end_with_owner, args=(line, is_made), name="vtengine-owner", daemon=True).start()
    try:
        backend: Backend = make(**options)
        is_made.set()
    except Exception as error:
        with suppress(OSError):  # the owner may have given up already
            write_frame(line, {"events": [{"event": "unready"} | _fault(error)], "stats": {}})
        return 1
    host = Host(backend, line)
    try:
        await host.serve()
    finally:
        await backend.close()
    return 1 if host.is_broken else 0


def main(descriptor: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # the owner's affair: it ends this process by closing the line
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as line:
        line.set_inheritable(False)  # what lives on after this process would hold it open
        frame = read_frame(line)
        if frame is None:
            return 1
        module, _, name = frame[0]["make"].partition(":")
        return asyncio.run(_serve(getattr(importlib.import_module(module), name), frame[0]["options"], line))


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(status)  # all is closed: the interpreter's own way out trips over threads of libraries
