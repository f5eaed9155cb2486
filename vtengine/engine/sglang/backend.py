"""`Backend` over SGLang: one translation and one reading of answers, two transports."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vtengine.engine.base import BackendFailed, Completion, OnTokens, Request, RequestRejected
from vtengine.engine.pace import Pace
from vtengine.engine.sglang import checks, translation
from vtengine.engine.sglang.gate import Gate
from vtengine.engine.sglang.pixels import PngCache
from vtengine.engine.sglang.reply import ReplyReader, TokenChunk, version_number
from vtengine.engine.sglang.served import ServedModel
from vtengine.engine.sglang.transport import ConnectionLost, ServerFacts, StaleWeights, Transport
from vtengine.engine.sglang.update import STALE_FEATURES, Update, WeightUpdates
from vtengine.engine.sglang.weights import folder_of, touches_vision

if TYPE_CHECKING:
    import torch

COUNTERS = (
    *("requests", "prompt_tokens", "cached_tokens", "prefill_tokens", "generated_tokens", "images_encoded"),
    *("requests_restarted", "retries", "failures"),
)
RETRY_PAUSE_S = 0.25

log = logging.getLogger(__name__)


class SglangBackend:
    """Made by `connect`. Belongs to one event loop.

    attempts: times a request is sent while the connection is lost before its first token. deadline_s: longest time a
    request may take, None for no limit. vision_cache_off: SGLang runs with SGLANG_VLM_CACHE_SIZE_MB=0; without that and
    without our plugin's hook `flush` there, new vision weights are refused. weights_dir: a folder that this process and
    SGLang both see, for weight updates given as tensors (None: a temporary one of this machine). on_update: what an
    update does with requests that run: waits for them, or aborts and then starts them again (streams are waited for).
    max_chunks_per_s: of all streams together, as of the embedded engine.
    """

    def __init__(
        self,
        transport: Transport,
        model: ServedModel,
        *,
        attempts: int = 3,
        deadline_s: float | None = 600.0,
        vision_cache_off: bool = False,
        weights_dir: Path | None = None,
        png_cache_bytes: int = 256 << 20,
        on_update: Literal["drain", "restart"] = "drain",
        max_chunks_per_s: float | None = None,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts = {attempts}: must be >= 1")
        for name, value in (("deadline_s", deadline_s), ("max_chunks_per_s", max_chunks_per_s)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} = {value}: must be > 0, or None")
        self.model = model
        self._transport = transport
        self._attempts, self._deadline_s = attempts, deadline_s
        self._vision_cache_off, self._weights_dir = vision_cache_off, weights_dir
        self._pngs = PngCache(png_cache_bytes)
        self._gate = Gate()
        self._checking = asyncio.Lock()
        self._facts: ServerFacts | None = None
        self._updates = WeightUpdates(transport, self._gate, model)
        self._restarts = on_update == "restart"
        self.max_chunks_per_s = max_chunks_per_s
        self._live: set[str] = set()
        self._sent: dict[str, str] = {}
        self._aborted: set[str] = set()
        self._counters: Counter[str] = Counter()
        self._background: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def where(self) -> str:
        """The address, or another name for messages."""
        return self._transport.where

    @property
    def version(self) -> int:
        """Of the weights that were loaded last."""
        return self._updates.version

    async def check(self) -> ServerFacts:
        """Asks SGLang what it is, once. Raises ServerUnsuitable (a ValueError) or BackendFailed (not there)."""
        async with self._checking:
            return self._facts or await self._ask()

    async def check_again(self, version: int) -> None:
        """After it was lost: is it back, the same, and with weights of `version`? Raises like `check`."""
        self._facts = None
        await self.adopt(version)

    async def adopt(self, version: int) -> None:
        """Weights of `version` were loaded into it by somebody else: from here on they are those that it must have.

        Raises StaleWeights where it has others; like `check`.
        """
        async with self._checking:
            await self._ask()
        if self.version != version:
            raise StaleWeights(f"{self.where}: has weights of version {self.version}, the others have {version}")

    @asynccontextmanager
    async def left_alone(self) -> AsyncIterator[None]:
        """Inside, nothing is sent by itself: somebody else updates the weights. `adopt` them afterwards."""
        yield

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        while True:
            try:
                completion = await self._completion(request, on_tokens)
                restarts = completion.finish == "cancelled" and request.request_id in self._aborted
            finally:
                self._aborted.discard(request.request_id)
            if not restarts:
                return completion
            self._counters["requests_restarted"] += 1

    async def load_weights(self, source: Path | Mapping[str, torch.Tensor], version: int) -> None:
        """source: a checkpoint folder that SGLang can read, or tensors by checkpoint name (a part is enough).

        Waits until running requests are done, and empties the caches. Raises ValueError, and changes nothing, for
        weights that do not fit, or vision weights while features would outlive them; BackendFailed if SGLang fails.
        """
        facts = await self.check()
        if touches_vision(source) and not self._flushes_features(facts):
            raise ValueError(f"load_weights: {STALE_FEATURES}")
        if isinstance(source, Mapping) and not source:
            async with self.updating(version):
                return
        with folder_of(source, self.model.config, self._weights_dir) as folder:
            async with self.updating(version) as update:
                await update.disk(folder)

    @asynccontextmanager
    async def updating(self, version: int) -> AsyncIterator[Update]:
        """Inside, nothing runs and the caches are empty; afterwards the weights are called `version`."""
        facts = await self.check()
        if self._restarts:
            self._abort_running()
        async with self._updates.session(version, self._flushes_features(facts), facts.tp_size) as update:
            yield update

    async def release_memory(self, tags: Sequence[str] = ("kv_cache",)) -> None:
        """Until the next update SGLang does without this memory, and requests wait. See `WeightUpdates`."""
        await self.check()
        await self._updates.release_memory(tags)

    def stats(self) -> dict[str, float]:
        """Counters since the start, of this backend's requests only, and the gauges running and weight_version."""
        figures = {name: float(self._counters[name]) for name in COUNTERS}
        return figures | {"running": float(self._gate.running), "weight_version": float(self.version)}

    async def close(self) -> None:
        self._closed = True
        if self._background:
            await asyncio.wait(self._background, timeout=5)
        await self._transport.close()

    async def _completion(self, request: Request, on_tokens: OnTokens | None) -> Completion:
        pace = Pace(self.max_chunks_per_s)
        kept: list[int] = []
        async with aclosing(self._run(request, streamed=on_tokens is not None)) as chunks:
            async for chunk in chunks:
                kept += chunk.token_ids
                pace.step(time.monotonic(), self._gate.running)
                if on_tokens is not None and kept and (pace.is_due or chunk.completion is not None):
                    on_tokens(tuple(kept))
                    kept.clear()
                if chunk.completion is not None:
                    return chunk.completion
        raise BackendFailed(f"request {request.request_id}: SGLang's answer ended without a completion")

    async def _ask(self) -> ServerFacts:
        """What SGLang is and which weights it has; the first time, whether it serves our model too."""
        facts = await self._transport.facts()
        checks.check_facts(facts, self.model, self._transport.where, self._transport.takes_tensors)
        if self._facts is None:
            await self._transport.check_model(self.model)
        self._facts, self._updates.version = facts, version_number(facts.weight_version)
        return facts

    def _flushes_features(self, facts: ServerFacts) -> bool:
        return self._vision_cache_off or "flush" in facts.hooks

    def _abort_running(self) -> None:
        """Those of generate(); they end as cancelled, and begin anew behind the gate."""
        for request_id, rid in self._sent.items():
            self._aborted.add(request_id)
            self._later(self._transport.abort(rid))

    async def _run(self, request: Request, streamed: bool) -> AsyncGenerator[TokenChunk, None]:
        """One request from admission to its end, whichever way it ends."""
        if self._closed:
            raise BackendFailed("the backend is closed")
        spans = translation.check(request, self.model)
        if request.request_id in self._live:
            message = f"request {request.request_id}: this id is being served already"
            raise RequestRejected("duplicate_request", message, "setup")
        self._live.add(request.request_id)
        try:
            facts = await self.check()
            payload = await self._payload(request, spans, streamed)
            await self._gate.enter()
            try:
                if self._updates.incomplete:
                    raise BackendFailed(f"{self.where}: {self._updates.incomplete}")
                async with aclosing(self._attempt(request, spans, payload, facts, streamed)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except BackendFailed:
                self._counters["failures"] += 1
                raise
            finally:
                self._gate.leave()
        finally:
            self._live.discard(request.request_id)

    async def _payload(self, request: Request, spans: list[translation.Span], streamed: bool) -> dict[str, Any]:
        if self._transport.takes_tensors:
            prompt = translation.with_tensors(request, self.model, spans)
        elif request.images:
            prompt = await asyncio.to_thread(translation.with_png, request, self.model, spans, self._pngs.data_url)
        else:
            prompt = translation.with_png(request, self.model, spans, self._pngs.data_url)
        return prompt | translation.options(request, self.model, streamed)

    async def _attempt(
        self,
        request: Request,
        spans: list[translation.Span],
        payload: dict[str, Any],
        facts: ServerFacts,
        streamed: bool,
    ) -> AsyncGenerator[TokenChunk, None]:
        """Sends until a first token came back; after that, a lost connection is a failure."""
        until = None if self._deadline_s is None else time.monotonic() + self._deadline_s
        for attempt in range(1, self._attempts + 1):
            reader = ReplyReader(request, spans, facts.incremental, self.version)
            try:
                async with aclosing(self._once(request, reader, payload, until, streamed)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except ConnectionLost as error:
                if reader.started or attempt == self._attempts:
                    raise
                log.warning("request %s: %s; attempt %d of %d", request.request_id, error, attempt + 1, self._attempts)
                self._counters["retries"] += 1
                await asyncio.sleep(RETRY_PAUSE_S * 2 ** (attempt - 1))

    async def _once(
        self, request: Request, reader: ReplyReader, payload: dict[str, Any], until: float | None, streamed: bool
    ) -> AsyncGenerator[TokenChunk, None]:
        """One sending. Aborts at SGLang what was not read to its end."""
        rid, done = uuid.uuid4().hex, False
        answer = self._transport.send(payload | {"rid": rid})
        if not streamed:
            self._sent[request.request_id] = rid
        try:
            while True:
                remaining = None if until is None else max(until - time.monotonic(), 0.001)
                try:
                    async with asyncio.timeout(remaining):
                        chunk = reader.push(await anext(answer))
                except TimeoutError:
                    message = f"request {request.request_id}: not done after {self._deadline_s} s (deadline_s)"
                    raise BackendFailed(message) from None
                except StopAsyncIteration:
                    raise ConnectionLost(f"{self._transport.where}: the answer ended early") from None
                if chunk is None:
                    continue
                if chunk.completion is not None:
                    done = True
                    self._count(chunk.completion)
                yield chunk
                if done:
                    return
        finally:
            self._sent.pop(request.request_id, None)
            if not done:
                self._later(self._transport.abort(rid))
            await answer.aclose()  # type: ignore[attr-defined]

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _count(self, completion: Completion) -> None:
        self._counters["requests"] += 1
        self._counters["prompt_tokens"] += completion.prompt_tokens
        self._counters["cached_tokens"] += completion.cached_tokens
        self._counters["prefill_tokens"] += completion.prefill_tokens
        self._counters["generated_tokens"] += len(completion.token_ids)
        self._counters["images_encoded"] += sum(completion.images_encoded)
