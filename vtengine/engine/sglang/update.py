"""An update of one SGLang's weights: what runs ends first, both caches are emptied, and every answer is looked at.

SGLang refuses to flush while a batch is in flight, and an update on top of one kills it. So: the gate closes, running
requests end (or are started again afterwards), the flush is repeated until SGLang says that it did, the tensors go in,
the caches are emptied again, and the weights get their version.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vtengine.engine.base import BackendFailed
from vtengine.engine.sglang.buckets import flatten, serialize
from vtengine.engine.sglang.transport import NOT_OFFERED
from vtengine.engine.sglang.weights import VISION, check_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from vtengine.engine.sglang.gate import Gate
    from vtengine.engine.sglang.served import ServedModel
    from vtengine.engine.sglang.transport import Transport

FLUSH_TRIES = 40
FLUSH_PAUSE_S = 0.25
STALE_FEATURES = (
    "SGLang keeps image features by content and does not drop them when the vision tower changes, so images it has "
    "seen would be answered with the old features. Start it with VTENGINE_SGLANG_HOOKS=flush in its environment "
    "(vtengine installed beside it), or with SGLANG_VLM_CACHE_SIZE_MB=0 and vision_cache_off=True here; or send "
    "language weights only"
)

Bucket = Sequence[tuple[str, "Tensor"]]
"""(checkpoint name, whole tensor)"""


class Update:
    """One SGLang, drained and empty, while its weights are replaced. `touched`: something was sent."""

    def __init__(self, transport: Transport, model: ServedModel, features_flushed: bool, tp_size: int) -> None:
        self._transport, self._model, self._features_flushed = transport, model, features_flushed
        self.ranks = tp_size
        self.touched = False

    async def disk(self, folder: Path) -> None:
        """A folder that SGLang can read; its shapes were checked."""
        self.touched = True
        body = {"model_path": str(folder), "flush_cache": False}
        await must(self._transport, "update_weights_from_disk", **body)

    async def tensors(self, bucket: Bucket) -> None:
        """Tensors of this machine: shared memory, or CUDA IPC on a GPU. Raises ValueError, BackendFailed."""
        self.check(bucket)
        self.touched = True
        flat = flatten(bucket)  # lives until SGLang has read it
        payload = serialize(flat, self._transport.is_child)
        body = {"serialized_named_tensors": [payload] * self.ranks, "load_format": "flattened_bucket"}
        await must(self._transport, "update_weights_from_tensor", **body, flush_cache=False)

    async def join(self, group: str, address: str, port: int, backend: str) -> None:
        """SGLang's processes enter, as ranks from 1, a process group whose rank 0 (the trainer) is at the address."""
        await self.join_as(group, address, port, backend, 1, self.ranks + 1)

    async def join_as(self, group: str, address: str, port: int, backend: str, first: int, world_size: int) -> None:
        """As ranks from `first`, where other servers' come before and after."""
        place = {"master_address": address, "master_port": port, "rank_offset": first, "world_size": world_size}
        await must(self._transport, "init_weights_update_group", **place, group_name=group, backend=backend)

    async def leave(self, group: str) -> None:
        await must(self._transport, "destroy_weights_update_group", group_name=group)

    async def receive(self, bucket: Bucket, group: str) -> None:
        """SGLang's side of a broadcast in the process group `group`; the trainer sends flatten(bucket) meanwhile.

        The bucket must have been checked: SGLang waits for the broadcast before it looks at the names.
        """
        self.touched = True
        await must(
            self._transport,
            "update_weights_from_distributed",
            names=[name for name, _ in bucket],
            dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            shapes=[list(tensor.shape) for _, tensor in bucket],
            group_name=group,
            load_format="flattened_bucket",
            flush_cache=False,
        )

    def check(self, bucket: Bucket) -> None:
        """Raises ValueError for what does not fit, which would kill SGLang, and for features that would outlive it."""
        check_shapes({name: tuple(tensor.shape) for name, tensor in bucket}, self._model.config, "weight update")
        if not self._features_flushed and any(name.startswith(VISION) for name, _ in bucket):
            raise ValueError(f"weight update: {STALE_FEATURES}")


class AnyUpdate(Protocol):
    """`Update` of one server or of a fleet: what a publisher needs."""

    ranks: int

    def check(self, bucket: Bucket) -> None: ...
    async def disk(self, folder: Path) -> None: ...
    async def tensors(self, bucket: Bucket) -> None: ...
    async def join(self, group: str, address: str, port: int, backend: str) -> None: ...
    async def leave(self, group: str) -> None: ...
    async def receive(self, bucket: Bucket, group: str) -> None: ...


class WeightUpdates:
    """Of one SGLang. version: of the weights it has now. incomplete: why it must not be asked anything, or empty."""

    def __init__(self, transport: Transport, gate: Gate, model: ServedModel) -> None:
        self._transport, self._gate, self._model = transport, gate, model
        self._released: tuple[AsyncExitStack, list[str]] | None = None
        self.version = 0
        self.incomplete = ""

    @asynccontextmanager
    async def session(self, version: int, features_flushed: bool, tp_size: int) -> AsyncIterator[Update]:
        """Nothing runs inside. Where it fails after something was sent, requests fail until another one succeeds."""
        async with AsyncExitStack() as stack:
            await self._enter(stack)
            update = Update(self._transport, self._model, features_flushed, tp_size)
            session = await offered(self._transport, "begin_weight_update")
            try:
                yield update
            except BaseException:
                if update.touched:
                    self.incomplete = f"the update to version {version} failed midway; load the weights again"
                raise
            finally:
                if session:
                    await must(self._transport, "end_weight_update")
            await self.flush()
            if update.touched or version != self.version:  # else it keeps its own name for them, such as "step-17"
                await self._transport.set_version(str(version))
            self.version, self.incomplete = version, ""

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Gives device memory back ("kv_cache", "weights"); requests wait until the next session, which takes it back.

        SGLang needs --enable-memory-saver for it; without that, and on a CPU, nothing is given back. What was released
        is lost: after "weights" the session must send all of them.
        """
        if self._released is not None:
            return
        stack = AsyncExitStack()
        try:
            await stack.enter_async_context(self._gate.closed())
            await self.flush()
            await must(self._transport, "release_memory_occupation", tags=list(tags))
        except BaseException:
            await stack.aclose()
            raise
        self._released = stack, list(tags)

    async def flush(self) -> None:
        """Empties the radix cache. Raises BackendFailed where somebody else's requests prevent it."""
        for _ in range(FLUSH_TRIES):
            if await self._transport.flush():
                return
            await asyncio.sleep(FLUSH_PAUSE_S)
        raise BackendFailed(f"{self._transport.where}: its cache cannot be emptied; somebody else's requests run there")

    async def _enter(self, stack: AsyncExitStack) -> None:
        """The gate is closed and SGLang is idle and empty from here on."""
        if self._released is None:
            await stack.enter_async_context(self._gate.closed())
            await self.flush()
            return
        released, tags = self._released
        self._released = None
        await stack.enter_async_context(released)
        await must(self._transport, "resume_memory_occupation", tags=tags)


async def must(transport: Transport, call: str, **fields: object) -> None:
    """Raises BackendFailed with SGLang's own words where it says no."""
    ok, message = await transport.control(call, **fields)
    if not ok:
        raise BackendFailed(f"{transport.where}: {call}: {message}")


async def offered(transport: Transport, call: str, **fields: object) -> bool:
    """False where this version of SGLang has no such call. Raises BackendFailed where it has one and says no."""
    ok, message = await transport.control(call, **fields)
    if not ok and message != NOT_OFFERED:
        raise BackendFailed(f"{transport.where}: {call}: {message}")
    return ok
