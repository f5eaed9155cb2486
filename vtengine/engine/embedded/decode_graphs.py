"""Decode steps on CUDA, captured once for each batch size and context, and replayed: one launch in place of hundreds.

A graph reads and writes fixed memory, which lives as long as the engine. What a step needs is one matrix with a row for
each sequence (its id, its position, where to write, how long it is, its pages), sent in one copy that does not block. A
batch is filled up to the next captured size with rows that write to a page of their own, which no sequence has. Tables
are cut to the next captured width, because a kernel may start programs for all that they could hold. Graphs are
captured when the engine starts, not in the middle of a step that others wait for. Only where rows are to be attended to
as siblings, they are captured when first needed: what their kernel is to do is one more buffer, with a graph for each
power of two of its items.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vtengine_kernels.prefix_attention import Impl, Siblings, capturable, prefix_attention
from vtengine_kernels.prefix_attention.split import ROWS, SPAN, items

if TYPE_CHECKING:
    from vtengine.engine.embedded.attention import KVCache, RowLayout
    from vtengine.model import VLModel

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
"""Up to 128 rows reading the weights takes longer than the products, so that rows that fill up a batch cost little."""
CONTEXT_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
"""What the tables of a graph can hold; longer sequences decode without one."""
FIRST_PAGE = 6
"""Columns of a step before a row's pages: token id, position (3), slot, length."""
_CAPTURING = threading.Lock()
"""torch.cuda.graph asks for one capture at a time in a process."""

log = logging.getLogger(__name__)


class DecodeGraphs:
    """Graphs by batch size and width of the tables. Suffixes: N rows, H hidden.

    Where a capture fails, there are none any more, and steps run without. capture False runs the same padded pass
    without a graph: how it is tested where there is no CUDA.
    """

    def __init__(self, model: VLModel, cache: KVCache, max_rows: int, capture: bool = True) -> None:
        self._model, self._cache, self._capture = model, cache, capture
        self._sizes = [*(size for size in BATCH_SIZES if size < max_rows), max_rows]
        most_pages = cache.spare_page  # of a sequence that has all there are
        self._widths = sorted({min(-(-tokens // cache.page_size), most_pages) for tokens in CONTEXT_TOKENS})
        device, numbers = model.device, max_rows * (FIRST_PAGE + self._widths[-1])
        self._steps = torch.zeros(numbers, dtype=torch.int64, device=device)
        self._sent = torch.zeros(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._work = torch.full((max_rows * -(-CONTEXT_TOKENS[-1] // SPAN), 1 + ROWS), -1, device=device)
        self._impl: Impl = capturable(cache.keys[0]) or "auto"
        self._replays: dict[tuple[int, int, int], Callable[[], Tensor]] = {}
        self._failed = False
        # One stream for all captures, so that they share memory; torch's own is on the GPU that captured first.
        self._stream = torch.cuda.Stream(device) if capture else None
        self._memory = torch.cuda.graph_pool_handle() if capture else None

    @staticmethod
    def of(model: VLModel, cache: KVCache, max_rows: int) -> DecodeGraphs | None:
        """None where graphs cannot be: on a CPU, and without a kernel that reads pages in place."""
        return DecodeGraphs(model, cache, max_rows) if capturable(cache.keys[0]) is not None else None

    @torch.inference_mode()
    def capture(self) -> None:
        """All but siblings'. The largest first: those that follow find room in its memory.

        To be called in the thread that replays them, on the model's device. torch's workspaces for cuBLAS, which graphs
        write to, may end with the thread that they were made for (pytorch issue 192061).
        """
        for width in reversed(self._widths):
            for size in reversed(self._sizes):
                self._next_step(size, width)
                self._send(size, width)
                if self._replay(size, width, 0) is None:
                    return
        torch.cuda.empty_cache()  # what the passes before the captures left to their stream, which no other may use

    def takes(self, layout: RowLayout) -> bool:
        """Whether every row is one token, and no context is too long."""
        return not self._failed and bool((layout.count == 1).all()) and layout.pages.shape[1] <= self._widths[-1]

    def run(
        self, token_ids: np.ndarray, positions: np.ndarray, slots: np.ndarray, layout: RowLayout,
        siblings: Siblings | None,
    ) -> Tensor | None:  # fmt: skip
        """int64 token_ids, slots [N], positions [3, N] -> hidden [N, H], valid until the next call.

        None: the graph could not be captured.
        """
        count, pages = layout.pages.shape
        size = next(size for size in self._sizes if size >= count)
        width = next(width for width in self._widths if width >= pages)
        step = self._next_step(size, width)
        step[:count, 0], step[:count, 1:4] = token_ids, positions.T
        step[:count, 4], step[:count, 5] = slots, layout.length
        step[:count, FIRST_PAGE : FIRST_PAGE + pages] = layout.pages
        self._send(size, width)
        replay = self._replay(size, width, 0 if siblings is None else self._set_work(siblings, layout, size))
        return None if replay is None else replay()[:count]

    def _next_step(self, size: int, width: int) -> np.ndarray:
        """int64 [size, FIRST_PAGE + width] to be filled and sent; every row is one that fills up a batch."""
        if self._copied is not None:
            self._copied.synchronize()  # the last step's copy read this memory
        step = self._sent[: size * (FIRST_PAGE + width)].view(size, -1).numpy()
        spare = self._cache.spare_page
        step.fill(0)  # steps of other sizes left other numbers where this one has pages
        step[:, : FIRST_PAGE + 1] = (0, 0, 0, 0, spare * self._cache.page_size, 1, spare)
        return step

    def _send(self, size: int, width: int) -> None:
        numbers = size * (FIRST_PAGE + width)
        self._steps[:numbers].copy_(self._sent[:numbers], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _set_work(self, siblings: Siblings, layout: RowLayout, size: int) -> int:
        """Fills the buffer; returns how much of it a graph is to go through. Rows that fill up a batch get no items."""
        found = items(siblings, layout.length)
        padded = min(1 << (max(len(found), size) - 1).bit_length(), len(self._work))
        self._work[: len(found)].copy_(_tensor(found))
        self._work[len(found) : padded] = -1
        return padded

    def _replay(self, size: int, width: int, work: int) -> Callable[[], Tensor] | None:
        key = (size, width, work)
        if key not in self._replays:
            try:
                self._replays[key] = self._captured(*key) if self._capture else lambda: self._forward(*key)
            except Exception as error:  # whatever it is, a pass without a graph may do without it
                self._failed = True
                self._replays.clear()  # what they share with the one that failed may be gone
                log.warning("decode steps run without CUDA graphs, which is slower: a capture failed: %r", error)
                return None
        return self._replays[key]

    def _captured(self, size: int, width: int, work: int) -> Callable[[], Tensor]:
        graph, stream, outside = torch.cuda.CUDAGraph(), self._stream, torch.cuda.current_stream(self._model.device)
        assert stream is not None
        # Not torch.cuda.graph: it empties torch's caches each time, and an error leaves the thread on its stream.
        with _CAPTURING:
            stream.wait_stream(outside)
            with torch.cuda.stream(stream):
                self._forward(size, width, work)  # a capture must neither compile a kernel nor set up a library
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
                try:
                    hidden = self._forward(size, width, work)
                finally:
                    graph.capture_end()
            outside.wait_stream(stream)

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay

    def _forward(self, size: int, width: int, work: int) -> Tensor:
        siblings = replace(Siblings.strangers(size), work=self._work[:work]) if work else None
        step = self._steps[: size * (FIRST_PAGE + width)].view(size, -1)
        token_ids, *positions, slots, lengths = step[:, :FIRST_PAGE].t().contiguous()
        attention = _InPlace(self._cache, slots, step[:, FIRST_PAGE:], lengths, siblings, self._impl)
        return self._model.decode(self._model.embed(token_ids), torch.stack(positions), attention)


@dataclass(frozen=True)
class _InPlace:
    """Attention of single tokens over pages read in place; an attention context (see `vtengine.model.attention`)."""

    cache: KVCache
    slots: Tensor
    tables: Tensor
    lengths: Tensor
    siblings: Siblings | None
    impl: Impl

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        cache.write(layer, self.slots, k, v)
        impl = self.impl if self.siblings is None else "auto"
        keys, values = cache.keys[layer], cache.values[layer]
        return prefix_attention(q, keys, values, self.tables, self.lengths, self.siblings, impl=impl)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
