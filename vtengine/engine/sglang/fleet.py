"""Several SGLang servers as one `Backend`: a prompt goes to the same one, and one that dies is done without."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vtengine.engine.base import BackendFailed, Completion, OnTokens, Request
from vtengine.engine.routing import routing_key
from vtengine.engine.sglang.backend import SglangBackend
from vtengine.engine.sglang.fleet_update import FleetUpdate
from vtengine.engine.sglang.transport import ConnectionLost, NoRoom, StaleWeights
from vtengine.engine.totals import total

if TYPE_CHECKING:
    import torch

    from vtengine.engine.sglang.update import Update

RETRY_S = 2.0

log = logging.getLogger(__name__)


class SglangFleet:
    """Belongs to one event loop. servers: over equal checkpoints.

    Which server a request prefers depends on its beginning alone (rendezvous hashing), so siblings of a prompt and the
    turns of an episode meet their prefix in one radix cache, and a server that comes or goes moves only its own.
    A server whose connection is lost is left out, and asked every `retry_s` whether it is back. One that is back with
    other weights than the others have waits for the next update, which takes it in again.
    """

    def __init__(self, servers: Sequence[SglangBackend], retry_s: float = RETRY_S) -> None:
        if not servers:
            raise ValueError("servers is empty: give at least one address")
        names = [server.where for server in servers]
        if len(set(names)) < len(names):
            raise ValueError(f"servers has {names}: every address once")
        self.servers = tuple(servers)
        self._retry_s = retry_s
        self._down: dict[SglangBackend, asyncio.Task[None]] = {}
        self._stale: set[SglangBackend] = set()
        self._counters: Counter[str] = Counter()

    @property
    def live(self) -> list[SglangBackend]:
        return [server for server in self.servers if server not in self._down]

    async def check(self) -> None:
        """Asks all servers what they are. Raises ServerUnsuitable for another kind, BackendFailed if none answers."""
        found = await asyncio.gather(*(server.check() for server in self.servers), return_exceptions=True)
        for server, fault in zip(self.servers, found, strict=True):
            if isinstance(fault, ConnectionLost):
                self._leave_out(server, fault)
            elif isinstance(fault, BaseException):
                raise fault
        if not self.live:
            raise BackendFailed(f"none of {len(self.servers)} servers answers: {found[0]}")

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        """Another server begins anew where one dies, unless the caller was given tokens already."""
        given = None if on_tokens is None else _Given(on_tokens)
        fault: ConnectionLost | StaleWeights | None = None
        for server in self._preferred(request):
            if server in self._down:
                continue
            if fault is not None:
                self._counters["failovers"] += 1
            try:
                return await server.generate(request, given)
            except (ConnectionLost, StaleWeights) as error:
                fault = error
                if not isinstance(error, NoRoom):
                    self._leave_out(server, error)
                if given is not None and given.any:
                    raise
        raise fault or BackendFailed(f"request {request.request_id}: none of {len(self.servers)} servers lives")

    async def load_weights(self, source: Path | Mapping[str, torch.Tensor], version: int) -> None:
        """On every server that lives. Raises ValueError where they do not fit, BackendFailed if none took them."""
        await self.on_all(lambda server: server.load_weights(source, version))

    async def adopt(self, version: int) -> None:
        """See `SglangBackend.adopt`. Servers without these weights are left out; raises BackendFailed if none has."""
        await self.on_all(lambda server: server.adopt(version))

    @asynccontextmanager
    async def left_alone(self) -> AsyncIterator[None]:
        """Inside, no server is asked whether it is back: somebody else updates the weights. `adopt` them afterwards."""
        down = dict(self._down)
        for task in down.values():
            task.cancel()
        await asyncio.gather(*down.values(), return_exceptions=True)
        try:
            yield
        finally:
            for server in down:
                if server in self._down:
                    self._wait(server)

    async def on_all(self, work: Callable[[SglangBackend], Awaitable[None]]) -> None:
        """At the same time, stale ones too; one that is lost or stale is left out. Raises other faults, at the end."""
        async with self._claimed() as (servers, done):
            found = await asyncio.gather(*(work(server) for server in servers), return_exceptions=True)
            others = []
            for server, fault in zip(servers, found, strict=True):
                if isinstance(fault, ConnectionLost | StaleWeights):
                    self._leave_out(server, fault)
                elif isinstance(fault, BaseException):
                    others.append(fault)
                else:
                    done.append(server)
            if others:
                raise others[0]

    @asynccontextmanager
    async def updating(self, version: int) -> AsyncIterator[FleetUpdate]:
        """Like `SglangBackend.updating`, on all servers that live or wait for an update.

        One that is lost before the first tensor is left out; after it, ConnectionLost is raised: try again, without it.
        """
        async with self._claimed() as (servers, done):
            async with AsyncExitStack() as stack:
                updates: list[Update] = []
                entered = []
                for server in servers:
                    try:
                        updates.append(await stack.enter_async_context(server.updating(version)))
                        entered.append(server)
                    except ConnectionLost as fault:
                        self._leave_out(server, fault)
                if not updates:
                    raise BackendFailed(f"none of {len(self.servers)} servers lives")
                yield FleetUpdate(updates)
            done += entered

    @asynccontextmanager
    async def _claimed(self) -> AsyncIterator[tuple[list[SglangBackend], list[SglangBackend]]]:
        """(servers to update, an empty list for those that were). Nobody else asks the stale ones meanwhile."""
        stale = list(self._stale)
        for server in stale:
            self._down[server].cancel()
        done: list[SglangBackend] = []
        try:
            yield [*self.live, *stale], done
        finally:
            for server in stale:
                if server in done:
                    self._take_in(server)
                elif server in self._stale:
                    self._wait(server)
        if not self.live:
            raise BackendFailed(f"none of {len(self.servers)} servers lives")

    async def release_memory(self, tags: Sequence[str] = ("kv_cache",)) -> None:
        """See `SglangBackend.release_memory`."""
        await self.on_all(lambda server: server.release_memory(tags))

    def stats(self) -> dict[str, float]:
        """Sums over the servers; weight_version is the oldest of those that live."""
        down = [server.stats() for server in self._down]
        own = {"servers": len(self.servers), "servers_down": len(down), "failovers": self._counters["failovers"]}
        figures = total((server.stats() for server in self.live), down)
        return figures | {name: float(value) for name, value in own.items()}

    async def close(self) -> None:
        for task in self._down.values():
            task.cancel()
        await asyncio.gather(*(server.close() for server in self.servers))

    def _preferred(self, request: Request) -> list[SglangBackend]:
        key = routing_key(request, self.servers[0].model.image_token_id)
        return sorted(self.servers, key=lambda server: hashlib.sha256(f"{key} {server.where}".encode()).digest())

    def _leave_out(self, server: SglangBackend, fault: BackendFailed) -> None:
        self._stale.discard(server)
        if server not in self._down or self._down[server].cancelled():
            log.warning("%s is left out until it answers again: %s", server.where, fault)
            self._wait(server)

    def _wait(self, server: SglangBackend) -> None:
        self._down[server] = asyncio.get_running_loop().create_task(self._wait_for(server))

    async def _wait_for(self, server: SglangBackend) -> None:
        """Until the server is back, with the weights that the others have."""
        told = ""
        while True:
            await asyncio.sleep(self._retry_s)
            try:
                await server.check_again(max((one.version for one in self.live), default=server.version))
                break
            except ConnectionLost:
                self._stale.discard(server)
            except (BackendFailed, ValueError) as error:
                if isinstance(error, StaleWeights):
                    self._stale.add(server)
                if str(error) != told:
                    told = str(error)
                    log.warning("%s stays left out: %s", server.where, error)
        self._take_in(server)

    def _take_in(self, server: SglangBackend) -> None:
        log.warning("%s is back", server.where)
        self._stale.discard(server)
        task = self._down.pop(server)
        if task is not asyncio.current_task():
            task.cancel()


class _Given:
    """Hands tokens on, and knows whether there were any."""

    def __init__(self, on_tokens: OnTokens) -> None:
        self._on_tokens = on_tokens
        self.any = False

    def __call__(self, token_ids: Sequence[int]) -> None:
        self.any = True
        self._on_tokens(token_ids)
