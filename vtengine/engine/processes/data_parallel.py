"""Several engines as one `Backend`: a prompt stays with the engine that knows its beginning; new ones balance."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vtengine.engine.base import BackendFailed, Completion, OnTokens, Request
from vtengine.engine.processes.engine_process import EngineLost, EngineProcess
from vtengine.engine.processes.wire import on_cpu
from vtengine.engine.routing import routing_key
from vtengine.engine.totals import total

if TYPE_CHECKING:
    import torch

MAX_KEYS = 1 << 16
"""Of prompts whose engine is remembered, far more than any engine's cache holds."""
IMBALANCE = 64
"""Requests that an engine may have more than another before a known prompt goes there all the same."""
RESTARTS = 3
RESTARTS_WITHIN_S = 3600.0
"""An engine that ends once more within this time is given up: it would go on. Faults weeks apart do not add up."""

log = logging.getLogger(__name__)


class DataParallel:
    """Belongs to one event loop. start(index): starts one of the `count` engines, all of the same weights.

    One whose process ends is started again with the next request; until it is there, the others serve. What ran in it
    raises EngineLost, and may be tried again at once. After new weights were loaded, it stays out.
    """

    def __init__(self, start: Callable[[int], EngineProcess], count: int, image_token_id: int) -> None:
        self._start, self._image_token_id = start, image_token_id
        self.engines = [start(index) for index in range(count)]
        self._known: OrderedDict[str, int] = OrderedDict()
        self._restarts: dict[int, asyncio.Task[None]] = {}
        self._restarted_s: dict[int, list[float]] = {}  # when each was started again, as far as it still counts
        self._num_restarts = 0
        self._ended: Mapping[str, float] = {}  # what engines counted that were replaced
        self._is_updated = self._is_closed = False

    async def check(self) -> None:
        """Waits for all engines. Raises what making one raised: ValueError, BackendFailed."""
        await asyncio.gather(*(engine.check() for engine in self.engines))

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        index = await self._engine_for(request)
        return await self.engines[index].generate(request, on_tokens)

    async def load_weights(self, source: Path | Mapping[str, torch.Tensor], version: int) -> None:
        """On every engine that lives; one that ends meanwhile is left out. Raises what any other raised, at the end."""
        if not isinstance(source, str | Path):  # once, not for each engine
            source = dict(zip(source, await asyncio.to_thread(on_cpu, source.values()), strict=True))
        changes = isinstance(source, str | Path) or bool(source) or version != self.stats()["weight_version"]
        before, self._is_updated = self._is_updated, True
        await self._stop_restarts()
        loads = [self.engines[index].load_weights(source, version) for index in self._living()]
        found = await asyncio.gather(*loads, return_exceptions=True)
        self._is_updated = before or (changes and None in found)
        faults = [fault for fault in found if fault is not None and not isinstance(fault, EngineLost)]
        if faults:
            raise faults[0]
        if None not in found:
            raise self._none_lives()

    @property
    def is_closed(self) -> bool:
        """By `close`, or because every engine has ended and none is started again: it serves nothing any more."""
        given_up = (index in self._restarts and self._restarts[index].done() for index in range(len(self.engines)))
        return self._is_closed or (not self._living() and (self._is_updated or all(given_up)))

    def stats(self) -> dict[str, float]:
        """Sums over the engines, with what those counted that were replaced."""
        living = [engine.stats() for engine in self.engines if not engine.is_lost]
        down = [engine.stats() for engine in self.engines if engine.is_lost]
        own = {"engines": len(self.engines), "engines_down": len(down), "engine_restarts": self._num_restarts}
        figures = total(living, (self._ended, *down))
        return figures | {name: float(value) for name, value in own.items()}

    async def close(self) -> None:
        self._is_closed = True
        await self._stop_restarts()
        await asyncio.gather(*(engine.close() for engine in self.engines))

    async def _stop_restarts(self) -> None:
        """Of those that go on; an engine that was given up stays so."""
        going = {index: task for index, task in self._restarts.items() if not task.done()}
        for task in going.values():
            task.cancel()
        await asyncio.gather(*going.values(), return_exceptions=True)
        for index in going:
            self._restarts.pop(index, None)

    def _none_lives(self) -> BackendFailed:
        return BackendFailed(f"none of {len(self.engines)} engines lives; the log tells why they ended")

    def _living(self) -> list[int]:
        return [index for index, engine in enumerate(self.engines) if not engine.is_lost]

    async def _engine_for(self, request: Request) -> int:
        """Starts those again that have ended; waits for one of them where none lives."""
        for index, engine in enumerate(self.engines):
            if engine.is_lost and index not in self._restarts and not (self._is_updated or self._is_closed):
                self._restarts[index] = asyncio.get_running_loop().create_task(self._restart(index))
        while not (living := self._living()):
            starting = [task for task in self._restarts.values() if not task.done()]
            if not starting:
                raise self._none_lives()
            await asyncio.wait(starting, return_when=asyncio.FIRST_COMPLETED)
        key = routing_key(request, self._image_token_id)
        least = min(living, key=lambda index: self.engines[index].num_running)
        index = self._known.pop(key, least)
        if index not in living or self.engines[index].num_running - self.engines[least].num_running > IMBALANCE:
            index = least
        self._known[key] = index
        if len(self._known) > MAX_KEYS:
            self._known.popitem(last=False)
        return index

    async def _restart(self, index: int) -> None:
        """Waits a second longer each time. The task stays where the engine is given up, so that no other begins."""
        old = self.engines[index]
        await old.close()
        while len(times := self._recent_restarts(index)) < RESTARTS:
            times.append(time.monotonic())
            self._num_restarts += 1
            log.warning("engine %s has ended and is started again", old.name)
            await asyncio.sleep(len(times))
            try:
                new = await self._started(index)
            except (ValueError, OSError, BackendFailed) as error:
                log.warning("engine %s: %s", old.name, error)
                continue
            self._ended = total((), (self._ended, old.stats()))
            self.engines[index] = new
            del self._restarts[index]
            return
        message = "engine %s was started again %d times within %.0f s and is left out now"
        log.error(message, old.name, RESTARTS, RESTARTS_WITHIN_S)

    def _recent_restarts(self, index: int) -> list[float]:
        since_s = time.monotonic() - RESTARTS_WITHIN_S
        times = self._restarted_s[index] = [one for one in self._restarted_s.get(index, ()) if one > since_s]
        return times

    async def _started(self, index: int) -> EngineProcess:
        engine = self._start(index)
        try:
            await engine.check()
        except BaseException:
            await engine.close()
            raise
        return engine
