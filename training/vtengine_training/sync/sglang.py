"""Weights to SGLang (an engine, a server, a fleet): as tensors of this machine, by broadcast, through a folder."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, Protocol

from safetensors.torch import save_file

from vtengine.engine.base import BackendFailed
from vtengine.engine.sglang.backend import SglangBackend
from vtengine.engine.sglang.buckets import flatten, in_buckets
from vtengine.engine.sglang.fleet import SglangFleet
from vtengine.engine.sglang.fleet_update import GRACE_S, together
from vtengine.engine.sglang.transport import ConnectionLost
from vtengine_training.sync.base import Weights
from vtengine_training.sync.daemon import in_daemon
from vtengine_training.sync.group import Group, open_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from torch import Tensor

    from vtengine.engine.sglang.update import AnyUpdate

BUCKET_BYTES = 512 << 20
ATTEMPTS = 3

log = logging.getLogger(__name__)


class Sender(Protocol):
    async def send(self, update: AnyUpdate, version: int, buckets: Iterable[list[tuple[str, Tensor]]]) -> None: ...


@dataclass
class SglangPublisher:
    """A `Publisher`. backend: of `vtengine.engine.sglang`.

    sender: how the tensors get there. bucket_bytes: of tensors on the way at the same time. released: memory that
    SGLang does without while the learner works: "kv_cache", and "weights" where `weights` are all of them.
    """

    backend: SglangBackend | SglangFleet
    weights: Weights
    sender: Sender
    bucket_bytes: int = BUCKET_BYTES
    released: tuple[str, ...] = ()
    _published: int | None = field(default=None, init=False)

    async def release(self) -> None:
        if self.released:
            await self.backend.release_memory(self.released)

    async def publish(self, version: int) -> None:
        """A version that was published already is not sent again, only the caches are emptied."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with self.backend.updating(version) as update:
                    if version != self._published or self.released:
                        buckets = in_buckets(self.weights(), self.bucket_bytes)
                        await self.sender.send(update, version, buckets)
                break
            except ConnectionLost as error:  # a fleet goes on without the server
                if attempt == ATTEMPTS:
                    raise
                log.warning("weights of version %d: %s; attempt %d of %d", version, error, attempt + 1, ATTEMPTS)
        self._published = version


@dataclass(frozen=True)
class ByTensor:
    """Handles on this machine's memory: shared memory on a CPU, CUDA IPC on a GPU that trainer and engine share."""

    async def send(self, update: AnyUpdate, version: int, buckets: Iterable[list[tuple[str, Tensor]]]) -> None:
        for bucket in buckets:
            await update.tensors(bucket)


@dataclass(frozen=True)
class ByDisk:
    """A folder that SGLang sees too (None: a temporary one of this machine). Works anywhere, and is the slowest."""

    folder: Path | None = None

    async def send(self, update: AnyUpdate, version: int, buckets: Iterable[list[tuple[str, Tensor]]]) -> None:
        with TemporaryDirectory(prefix=f"vtengine-weights-{version}-", dir=self.folder) as name:
            for number, bucket in enumerate(buckets):
                update.check(bucket)
                tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in bucket}
                path = Path(name) / f"part-{number:05}.safetensors"
                await asyncio.to_thread(save_file, tensors, path, {"format": "pt"})
            await update.disk(Path(name))


@dataclass(frozen=True)
class ByBroadcast:
    """A process group of the trainer (rank 0) and all of SGLang's processes, opened for each update.

    backend: nccl, or gloo where tensors are on a CPU. NCCL cannot join trainer and engine on one GPU: use ByTensor.
    address: of this machine, as the servers reach it. Calls into the group have threads that nothing waits for: NCCL
    meets in the first broadcast, and its wait for a server that died before then has no end.
    """

    backend: Literal["nccl", "gloo"] = "nccl"
    address: str = "127.0.0.1"

    async def send(self, update: AnyUpdate, version: int, buckets: Iterable[list[tuple[str, Tensor]]]) -> None:
        async with self._group(update, version) as group:
            for bucket in buckets:
                update.check(bucket)
                flat = flatten(bucket)["flattened_tensor"]
                sending = in_daemon(group.broadcast, flat)
                await together([update.receive(bucket, group.name), sending], GRACE_S)

    @asynccontextmanager
    async def _group(self, update: AnyUpdate, version: int) -> AsyncIterator[Group]:
        port = free_port()
        name = f"vtengine-{version}-{port}"  # another attempt meets in another group
        place = (name, self.backend, self.address, port, update.ranks + 1)
        opening = in_daemon(open_group, *place)
        try:
            # To both ends: whoever waits for a server that is lost waits until the opening gives up.
            await together([opening, update.join(name, self.address, port, self.backend)])
            group = opening.result()
            yield group
        except BaseException:
            ends: list[Awaitable[None]] = [update.leave(name)]
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                ends.append(in_daemon(opening.result().abort))
            with suppress(BackendFailed, TimeoutError):
                await asyncio.wait_for(together(ends), GRACE_S)
            raise
        # At the same time: on one machine NCCL ends a group only when all of its processes end it.
        await together([in_daemon(group.close), update.leave(name)], GRACE_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
