"""Compute each thing once: an LRU cache bounded in bytes whose concurrent misses share one job on a worker thread."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)
Submit = Callable[[Callable[[], None]], object]


@dataclass(eq=False)
class _Pending:
    """A value on its way. `waiters` at 0 before the job starts means that nobody wants it any more."""

    future: Future[Any] = field(default_factory=Future)
    waiters: int = 0


class OnceCache:
    """Values by key, computed in worker threads. Awaitable from any event loop; all state is behind one lock.

    A failure reaches every waiter and is forgotten: the next request tries again. A value larger than the cache is
    handed out and not kept. A job that all its waiters have left (cancelled) before it started is not run.
    """

    def __init__(self, num_workers: int, max_bytes: int, name: str) -> None:
        if num_workers < 1:
            raise ValueError(f"{name}.num_workers = {num_workers}: must be >= 1")
        if max_bytes < 0:
            raise ValueError(f"{name}.cache_bytes = {max_bytes}: must be >= 0 (0 keeps nothing)")
        self._name = name
        self._max_bytes = max_bytes
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._pending: dict[Hashable, _Pending] = {}
        self._closed = False
        self.used_bytes = 0
        self.hits = 0
        self.shared = 0
        self.misses = 0
        self.evictions = 0

    async def get(
        self, key: Hashable, compute: Callable[[], Any], size: Callable[[Any], int], submit: Submit | None = None
    ) -> Any:
        """The value of `key`: kept, on its way, or `compute()`d now. `size` gives its bytes; 0 = do not keep it.

        submit: runs the job elsewhere than in the worker threads; `close` does not wait for it.
        """
        return (await self.get_all((key,), lambda _: (compute(),), size, submit))[0]

    async def get_all(
        self,
        keys: Sequence[K],
        compute: Callable[[tuple[K, ...]], Sequence[Any]],
        size: Callable[[Any], int],
        submit: Submit | None = None,
    ) -> list[Any]:
        """The values of `keys`, in order. Those neither kept nor on their way are computed by one call, together."""
        found, joined = self._claim(keys, compute, size, submit or self._workers.submit)
        try:
            for entry in joined.values():
                await _done(entry.future)
        finally:
            with self._lock:
                for entry in joined.values():
                    entry.waiters -= 1
        return [found[key] if key in found else joined[key].future.result() for key in keys]

    def kept(self, keys: Sequence[Hashable]) -> list[Any] | None:
        """The values of `keys` if the cache holds every one, else None."""
        with self._lock:
            if not all(key in self._kept for key in keys):
                return None
            return [self._recall(key) for key in keys]

    def forget(self) -> None:
        """Drops what is kept; what is on its way stays so."""
        with self._lock:
            self._kept.clear()
            self.used_bytes = 0

    def close(self) -> None:
        """Takes no more requests, finishes those accepted, drops what is kept. Blocks; may be called twice."""
        with self._lock:
            self._closed = True
        self._workers.shutdown(wait=True)
        self.forget()

    def _claim(
        self,
        keys: Sequence[Hashable],
        compute: Callable[..., Sequence[Any]],
        size: Callable[[Any], int],
        submit: Submit,
    ) -> tuple[dict[Hashable, Any], dict[Hashable, _Pending]]:
        """The values at hand, and entries to wait for with this caller counted in; starts a job for the new ones."""
        found: dict[Hashable, Any] = {}
        joined: dict[Hashable, _Pending] = {}
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name} is closed")
            new: dict[Hashable, _Pending] = {}
            for key in dict.fromkeys(keys):
                if key in self._kept:
                    found[key] = self._recall(key)
                    continue
                if key in self._pending:
                    self.shared += 1
                else:
                    self._pending[key] = new[key] = _Pending()
                    self.misses += 1
                joined[key] = self._pending[key]
                joined[key].waiters += 1
            if new:
                submit(partial(self._run, new, compute, size))
        return found, joined

    def _recall(self, key: Hashable) -> Any:
        self._kept.move_to_end(key)
        self.hits += 1
        return self._kept[key][0]

    def _run(
        self, entries: dict[Hashable, _Pending], compute: Callable[..., Sequence[Any]], size: Callable[[Any], int]
    ) -> None:
        with self._lock:
            for key in [key for key, entry in entries.items() if entry.waiters == 0]:
                del entries[key], self._pending[key]
        if not entries:
            return
        try:
            values = compute(tuple(entries))
            sizes = [size(value) for _, value in zip(entries, values, strict=True)]
        except BaseException as fault:
            self._forget(entries)
            for entry in entries.values():
                entry.future.set_exception(fault)
            return
        with self._lock:
            for key, value, num_bytes in zip(entries, values, sizes, strict=True):
                del self._pending[key]
                self._keep(key, value, num_bytes)
        for entry, value in zip(entries.values(), values, strict=True):
            entry.future.set_result(value)

    def _forget(self, entries: dict[Hashable, _Pending]) -> None:
        with self._lock:
            for key in entries:
                del self._pending[key]

    def _keep(self, key: Hashable, value: Any, num_bytes: int) -> None:
        if not 0 < num_bytes <= self._max_bytes:
            return
        self._kept[key] = value, num_bytes
        self.used_bytes += num_bytes
        while self.used_bytes > self._max_bytes:
            _, (_, dropped) = self._kept.popitem(last=False)
            self.used_bytes -= dropped
            self.evictions += 1


async def _done(future: Future[Any]) -> None:
    """Waits for the future without ever cancelling it: others may wait for it too."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    def from_worker(_: Future[Any]) -> None:
        try:
            loop.call_soon_threadsafe(wake)
        except RuntimeError:  # the loop was closed while the job ran
            return

    future.add_done_callback(from_worker)
    await waiter
