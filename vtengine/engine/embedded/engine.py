"""The engine as its callers see it: coroutines that hand requests to the worker thread and wait for their answers."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtengine.engine.base import BackendFailed, Completion, RequestRejected
from vtengine.engine.embedded.admission import prepare
from vtengine.engine.embedded.answers import Answers
from vtengine.engine.embedded.attention import KVCache
from vtengine.engine.embedded.caller import Caller, Outbox
from vtengine.engine.embedded.config import EngineConfig
from vtengine.engine.embedded.encode_ahead import EncodeAhead
from vtengine.engine.embedded.encoder import Encoder
from vtengine.engine.embedded.pages import PagePool
from vtengine.engine.embedded.radix import RadixTree
from vtengine.engine.embedded.runner import Runner
from vtengine.engine.embedded.scheduler import Scheduler
from vtengine.engine.embedded.stop import Decoder, StopFinder
from vtengine.engine.embedded.vision_cache import VisionCache
from vtengine.engine.embedded.worker import Update, Worker
from vtengine.engine.pace import Pace
from vtengine.model import hf_tensors, load_model, store_aligned, store_by_column

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vtengine.engine.base import OnTokens, Request
    from vtengine.engine.embedded.sequence import Sequence
    from vtengine.model import VLModel


class EmbeddedEngine:
    """A `Backend` over a model in this process. `close` it: the worker thread keeps it alive.

    A model that nobody trains (no parameter wants a gradient) may be stored as it is read fastest: see store_by_column,
    store_aligned.

    Requests may come from any event loop. Weight updates wait until what is running has finished, so that every
    completion comes from one version; what waits is served after.
    """

    def __init__(self, model: VLModel, tokenizer: Decoder, config: EngineConfig | None = None) -> None:
        self.config = config = config or EngineConfig()
        self.model = model.to(config.device) if config.device else model
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            store_by_column(self.model)
            store_aligned(self.model)
        text, dtype, on_gpu = model.config.text, model.dtype, self.model.device.type == "cuda"
        page_size = config.tokens_per_page(on_gpu)
        page_bytes = 2 * text.num_layers * page_size * text.num_kv_heads * text.head_dim * dtype.itemsize
        num_pages = config.pages_that_fit(page_size, page_bytes, _free_bytes(self.model.device))
        cache = KVCache(
            text.num_layers, num_pages, page_size, text.num_kv_heads, text.head_dim, dtype, self.model.device
        )
        self.pool = PagePool(num_pages, page_size)
        self.tree = RadixTree(self.pool)
        self.vision = VisionCache(config.vision_bytes(on_gpu))
        self.scheduler = Scheduler(
            self.pool, self.tree,
            max_batch_tokens=config.batch_tokens(on_gpu), max_running=config.max_running, resume=config.resume,
        )  # fmt: skip
        self.encoder = Encoder(self.model, self.vision, config.resume)
        self.runner = Runner(
            self.model, cache, self.encoder, config.max_running, config.share_prefix, config.cuda_graphs
        )
        self._outbox, self._pace = Outbox(), Pace(config.max_chunks_per_s)
        self.answers = Answers(self.scheduler, self.encoder, StopFinder(tokenizer), self._pace)
        ahead = EncodeAhead(self.encoder, self.scheduler, config.num_threads, config.encode_ahead)
        overlap = on_gpu if config.overlap is None else config.overlap
        self.worker = Worker(
            self.scheduler, self.runner, ahead, self.answers, self._outbox, overlap, config.num_threads
        )
        self._live: dict[str, Sequence] = {}
        self.worker.start()

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        caller = Caller(self._outbox, self._pace, on_tokens)
        sequence = self._submit(request, caller)
        try:
            return await caller.completion
        finally:
            self._leave(sequence)

    def cancel(self, request_id: str) -> None:
        """Ends a request: its `generate` returns what was sampled, finish "cancelled". Ignores unknown ids."""
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._end(sequence)

    async def load_weights(self, source: Path | Mapping[str, torch.Tensor], version: int) -> None:
        """source: a checkpoint folder, or tensors by checkpoint name (a part of them is enough).

        Raises ValueError, and changes nothing, if they do not fit the model.
        """
        loop = asyncio.get_running_loop()
        if isinstance(source, str | Path):
            source = hf_tensors(await asyncio.to_thread(load_model, source, dtype=self.model.dtype))
        update = Update(dict(source), version, loop, loop.create_future())
        self.worker.post(partial(self.worker.updates.append, update))
        await update.done

    @property
    def is_closed(self) -> bool:
        """By `close`, or because its GPU is lost: it serves nothing any more."""
        return self.worker.is_closed

    def stats(self) -> dict[str, float]:
        """Counters since the start, and gauges of now (running, waiting, pages_*, *_bytes)."""
        encoder, scheduler, pool = self.encoder, self.scheduler, self.pool
        names = ("prompt_tokens", "cached_tokens", "recomputed_tokens", "preemptions")
        figures = self.answers.counters | {name: scheduler.counters[name] for name in names}
        figures |= {
            "images_encoded": encoder.num_encoded,
            "vision_cache_hits": self.vision.num_hits + encoder.num_shared,
            "vision_cache_bytes": self.vision.num_bytes,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "pages_total": pool.num_pages,
            "pages_in_use": pool.num_pages - pool.num_available,
            "pages_cached": self.tree.num_pages,
            "pages_evicted": self.tree.num_evicted,
            "weight_version": encoder.weight_version,
        }
        return {name: float(value) for name, value in figures.items()}

    async def close(self) -> None:
        """Stops the worker; requests still in it raise BackendFailed."""
        await asyncio.to_thread(self.worker.close)

    def _submit(self, request: Request, caller: Caller) -> Sequence:
        if request.request_id in self._live:
            message = f"request {request.request_id}: this id is being served already"
            raise RequestRejected("duplicate_request", message, "setup")
        sequence = prepare(request, self.model.config, self.pool)
        sequence.caller = caller
        self._live[request.request_id] = sequence
        try:
            self.worker.post(partial(self.worker.enqueue, sequence))
        except BackendFailed:
            del self._live[request.request_id]
            raise
        return sequence

    def _leave(self, sequence: Sequence) -> None:
        """The caller is gone: with its answer, or without one, which cancels the request."""
        del self._live[sequence.request.request_id]
        if sequence.finish is None:
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        with contextlib.suppress(BackendFailed):  # closed meanwhile: it has failed already
            self.worker.post(partial(self.answers.cancel, sequence))


def _free_bytes(device: torch.device) -> int | None:
    """Of a GPU's memory, with what torch holds for tensors to come; None: main memory."""
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
