"""The engine: one worker thread that steps, and coroutines that wait for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtengine.engine.base import BackendFailed, Completion, RequestRejected
from vtengine.engine.embedded.admission import prepare
from vtengine.engine.embedded.attention import KVCache
from vtengine.engine.embedded.caller import Caller, Outbox
from vtengine.engine.embedded.config import EngineConfig
from vtengine.engine.embedded.encode_ahead import EncodeAhead
from vtengine.engine.embedded.encoder import Encoder, ImagesTooLarge
from vtengine.engine.embedded.pages import PagePool
from vtengine.engine.embedded.radix import RadixTree
from vtengine.engine.embedded.runner import Runner
from vtengine.engine.embedded.scheduler import Row, Scheduler
from vtengine.engine.embedded.stop import Decoder, StopFinder
from vtengine.engine.embedded.vision_cache import VisionCache
from vtengine.engine.pace import Pace
from vtengine.engine.waiting import set_error, set_result
from vtengine.model import hf_tensors, load_model, load_tensors, store_by_column

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vtengine.engine.base import Finish, OnTokens, Request
    from vtengine.engine.embedded.sequence import Sequence
    from vtengine.model import VLModel


class EmbeddedEngine:
    """A `Backend` over a model in this process. `close` it: the worker thread keeps it alive.

    A model that nobody trains (no parameter wants a gradient) may be stored as it is read fastest: see store_by_column.

    Requests may come from any event loop; everything below `step` happens in the worker thread. Weight updates wait
    until what is running has finished, so that every completion comes from one version; what waits is served after.
    """

    def __init__(self, model: VLModel, tokenizer: Decoder, config: EngineConfig | None = None) -> None:
        self.config = config = config or EngineConfig()
        self.model = model.to(config.device) if config.device else model
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            store_by_column(self.model)
        text, dtype = model.config.text, model.dtype
        page_bytes = 2 * text.num_layers * config.page_size * text.num_kv_heads * text.head_dim * dtype.itemsize
        num_pages = config.pages_that_fit(page_bytes, _free_bytes(self.model.device))
        cache = KVCache(
            text.num_layers, num_pages, config.page_size, text.num_kv_heads, text.head_dim, dtype, self.model.device
        )
        self.pool = PagePool(num_pages, config.page_size)
        self.tree = RadixTree(self.pool)
        self.vision = VisionCache(config.vision_cache_bytes if config.resume else 0)
        self.scheduler = Scheduler(
            self.pool, self.tree,
            max_batch_tokens=config.max_batch_tokens, max_running=config.max_running, resume=config.resume,
        )  # fmt: skip
        self.encoder = Encoder(self.model, self.vision, config.resume)
        self.runner = Runner(
            self.model, cache, self.encoder, config.max_running, config.share_prefix, config.cuda_graphs
        )
        self._ahead = EncodeAhead(self.encoder, self.scheduler, config.num_threads, config.encode_ahead)
        self._stops = StopFinder(tokenizer)
        self._pace = Pace(config.max_chunks_per_s)
        self._live: dict[str, Sequence] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._updates: deque[_Update] = deque()
        self._wake = threading.Condition()
        self._outbox = Outbox()
        self._closed = False
        self._counters = dict.fromkeys(("steps", "batch_tokens", "prefill_tokens", "generated_tokens", "requests"), 0)
        self._worker = threading.Thread(target=self._serve, name="vtengine-engine", daemon=True)
        self._begun = threading.Event()
        self._worker.start()
        self._begun.wait()  # a synchronisation of the GPU by who made the engine would break a capture

    # ---- coroutines -------------------------------------------------------------------------------------------------

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
            self._post(lambda: self._cancel(sequence))

    async def load_weights(self, source: Path | Mapping[str, torch.Tensor], version: int) -> None:
        """source: a checkpoint folder, or tensors by checkpoint name (a part of them is enough).

        Raises ValueError, and changes nothing, if they do not fit the model.
        """
        loop = asyncio.get_running_loop()
        if isinstance(source, str | Path):
            source = hf_tensors(await asyncio.to_thread(load_model, source, dtype=self.model.dtype))
        update = _Update(dict(source), version, loop, loop.create_future())
        self._post(lambda: self._updates.append(update))
        await update.done

    @property
    def is_closed(self) -> bool:
        """By `close`, or because its GPU is lost: it serves nothing any more."""
        return self._closed

    def stats(self) -> dict[str, float]:
        """Counters since the start, and gauges of now (running, waiting, pages_*, *_bytes)."""
        encoder, scheduler, pool = self.encoder, self.scheduler, self.pool
        names = ("prompt_tokens", "cached_tokens", "recomputed_tokens", "preemptions")
        figures = self._counters | {name: scheduler.counters[name] for name in names}
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
        with self._wake:
            self._closed = True
            self._wake.notify()
        await asyncio.to_thread(self._worker.join)

    def _submit(self, request: Request, caller: Caller) -> Sequence:
        if request.request_id in self._live:
            message = f"request {request.request_id}: this id is being served already"
            raise RequestRejected("duplicate_request", message, "setup")
        sequence = prepare(request, self.model.config, self.pool)
        sequence.caller = caller
        self._live[request.request_id] = sequence
        try:
            self._post(lambda: self._enqueue(sequence))
        except BackendFailed:
            del self._live[request.request_id]
            raise
        return sequence

    def _enqueue(self, sequence: Sequence) -> None:
        self._ahead.hold(sequence)
        self.scheduler.submit(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """The caller is gone: with its answer, or without one, which cancels the request."""
        del self._live[sequence.request.request_id]
        if sequence.finish is None and not self._closed:
            self._post(lambda: self._cancel(sequence))

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._closed:
                raise BackendFailed("the engine is closed")
            self._commands.append(command)
            self._wake.notify()

    # ---- the worker thread ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        if self.config.num_threads is not None:
            torch.set_num_threads(self.config.num_threads)
        if self.model.device.type == "cuda":  # a new thread begins on the first GPU
            torch.cuda.set_device(self.model.device)
        fault: Exception | None = None
        try:
            if self.runner.graphs is not None:
                self.runner.graphs.capture()
            self._begun.set()
            while self._take_commands():
                try:
                    self.step()
                except Exception as error:
                    fault = error
                    self._fail_all(error)
                    self._forget()
                    fault = None
                self._outbox.deliver()
        finally:  # with a fault where a GPU is lost: its caches cannot even be emptied, but nobody waits for ever
            self._begun.set()
            with self._wake:
                self._closed = True
            self._take_commands()
            self._fail_all(fault)
            self._ahead.close()
            for update in self._updates:
                closed = BackendFailed("the engine was closed")
                self._outbox.add(update.loop, partial(set_error, update.done, closed))
            self._outbox.deliver()
        self._forget()

    def _take_commands(self) -> bool:
        """Carries out what was posted, waiting if there is nothing to do; False once closed."""
        with self._wake:
            while not self._closed and not self._commands and self.scheduler.idle and not self._updates:
                self._wake.wait()
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        return not self._closed

    def step(self) -> None:
        """Schedule, run, sample, commit: one forward pass."""
        alone, admit = not self.scheduler.running, not self._updates
        self._ahead.collect(wait=alone)
        rows = self.scheduler.schedule(admit, held=alone and not self._ahead.is_busy)
        if rows:
            if admit:
                self._ahead.begin()
            try:
                token_ids, logprobs = self.runner.run(rows)
            except ImagesTooLarge as error:
                self.scheduler.restart(without=error.sequences)
                self._fail(error.sequences, str(error), error)
                return
            self.scheduler.computed(rows)
            self._commit(rows, token_ids, logprobs)
        elif self._updates:
            self._update(self._updates.popleft())

    def _update(self, update: _Update) -> None:
        """Only while nothing runs. A failed update leaves weights and caches as they are."""
        self._ahead.forget()
        try:
            load_tensors(self.model, update.tensors, partial=True)
        except Exception as error:
            self._outbox.add(update.loop, partial(set_error, update.done, error))
            return
        self.tree.clear()
        self.runner.forget()
        self.encoder.weight_version = update.version
        for sequence in self.scheduler.waiting:
            sequence.features.clear()
            self._ahead.hold(sequence)
        self._outbox.add(update.loop, partial(set_result, update.done, None))

    def _commit(self, rows: list[Row], token_ids: list[int], logprobs: list[float]) -> None:
        now = time.perf_counter()
        self._pace.step(now, len(token_ids))
        self._counters["steps"] += 1
        self._counters["generated_tokens"] += len(token_ids)
        for row in rows:
            self._counters["batch_tokens"] += row.count
            if row.start < row.sequence.num_prompt:
                self._counters["prefill_tokens"] += min(row.count, row.sequence.num_prompt - row.start)
        sequences = [row.sequence for row in rows if row.samples]
        for sequence, token_id, logprob in zip(sequences, token_ids, logprobs, strict=True):
            if not sequence.logprobs:
                sequence.first_token_s = now
            sequence.append(token_id, logprob)
            if sequence.caller is not None:
                sequence.caller.sampled(token_id)
            finish = self._finished(sequence, token_id)
            if finish is not None:
                self._close_sequence(sequence, finish)

    def _finished(self, sequence: Sequence, token_id: int) -> Finish | None:
        sampling = sequence.request.sampling
        if token_id in sampling.stop_token_ids:
            return "stop"
        if sampling.stop and self._stops.found(sequence.tokens[sequence.num_prompt :], sampling.stop):
            return "stop"
        return "length" if sequence.num_outputs >= sampling.max_new_tokens else None

    def _cancel(self, sequence: Sequence) -> None:
        if sequence.finish is None:
            self._close_sequence(sequence, "cancelled")

    def _close_sequence(self, sequence: Sequence, finish: Finish) -> None:
        self.scheduler.finish(sequence, finish)
        self._counters["requests"] += 1
        now = time.perf_counter()
        completion = Completion(
            request_id=sequence.request.request_id,
            token_ids=tuple(sequence.tokens[sequence.num_prompt :]),
            logprobs=tuple(sequence.logprobs),
            finish=finish,
            prompt_tokens=sequence.num_prompt,
            cached_tokens=max(sequence.cached_tokens, 0),
            images_encoded=tuple(sequence.encoded),
            weight_version=self.encoder.weight_version,
            ttft_s=(sequence.first_token_s or now) - sequence.submitted_s,
            latency_s=now - sequence.submitted_s,
        )
        if sequence.caller is not None:
            sequence.caller.finished(completion)

    def _fail_all(self, error: Exception | None) -> None:
        """A pass failed (None: the engine was closed): every request fails; `_forget`: no page is trusted any more."""
        message = "the engine was closed" if error is None else f"a step failed: {error!r}"
        self._fail(self.scheduler.drop_all(), message, error)

    def _fail(self, sequences: Iterable[Sequence], message: str, cause: Exception | None) -> None:
        """Sequences that the scheduler has no more."""
        for sequence in sequences:
            sequence.finish = "error"
            sequence.features.clear()
            if sequence.caller is not None:
                failure = BackendFailed(message)
                failure.__cause__ = cause
                sequence.caller.failed(failure)

    def _forget(self) -> None:
        self.runner.forget()
        self._ahead.forget()


def _free_bytes(device: torch.device) -> int | None:
    """Of a GPU's memory, with what torch holds for tensors to come; None: main memory."""
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


@dataclass(frozen=True)
class _Update:
    """New weights, by checkpoint name, and who waits for them."""

    tensors: dict[str, torch.Tensor]
    version: int
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
