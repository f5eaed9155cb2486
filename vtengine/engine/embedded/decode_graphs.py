"""Decode steps on CUDA, captured once for each batch size and context, and replayed: one launch in place of hundreds.

A graph reads and writes fixed memory, which lives as long as the engine. What a step needs is one matrix with a row for
each sequence (its id, its position, where to write, how long it is, its pages), sent in one copy that does not block. A
batch is filled up to the next captured size with rows that write to a page of their own, which no sequence has. Tables
are cut to the next captured width, because a kernel may start programs for all that they could hold. Where rows are to
be attended to as siblings, what their kernel is to do is one more buffer, and a graph is captured for each power of two
of its items.
"""

from __future__ import annotations

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

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXT_TOKENS = (1024, 2048, 4096, 8192, 16384)
"""What the tables of a graph can hold; longer sequences decode without one."""
FIRST_PAGE = 6
"""Columns of a step before a row's pages: token id, position (3), slot, length."""
WARM_UPS = 2
"""Passes before a capture, which must neither compile a kernel nor set up a library."""
_CAPTURING = threading.Lock()
"""A capture begins with a synchronisation of the device, which would break that of another engine."""


class DecodeGraphs:
    """Graphs by batch size and width of the tables, captured when first needed. Suffixes: N rows, H hidden.

    capture False runs the same padded pass without a graph: how it is tested where there is no CUDA.
    """

    def __init__(self, model: VLModel, cache: KVCache, max_rows: int, capture: bool = True) -> None:
        self._model, self._cache, self._capture = model, cache, capture
        self._sizes = [*(size for size in BATCH_SIZES if size < max_rows), max_rows]
        self._widths = [-(-tokens // cache.page_size) for tokens in CONTEXT_TOKENS]
        device, columns = model.device, FIRST_PAGE + self._widths[-1]
        self._steps = torch.zeros(max_rows, columns, dtype=torch.int64, device=device)
        self._sent = torch.zeros(max_rows * columns, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._work = torch.full((max_rows * -(-CONTEXT_TOKENS[-1] // SPAN), 1 + ROWS), -1, device=device)
        self._impl: Impl = capturable(cache.keys[0]) or "auto"
        self._replays: dict[tuple[int, int, int], Callable[[], Tensor]] = {}
        # One stream for all captures, so that they share memory; torch's own is on the GPU that captured first.
        self._stream = torch.cuda.Stream(device) if capture else None
        self._memory = torch.cuda.graph_pool_handle() if capture else None

    @staticmethod
    def of(model: VLModel, cache: KVCache, max_rows: int) -> DecodeGraphs | None:
        """None where graphs cannot be: on a CPU, and without a kernel that reads pages in place."""
        return DecodeGraphs(model, cache, max_rows) if capturable(cache.keys[0]) is not None else None

    def takes(self, layout: RowLayout) -> bool:
        """Whether every row is one token, and no context is too long."""
        return bool((layout.count == 1).all()) and layout.pages.shape[1] <= self._widths[-1]

    def run(
        self, token_ids: np.ndarray, positions: np.ndarray, slots: np.ndarray, layout: RowLayout,
        siblings: Siblings | None,
    ) -> Tensor:  # fmt: skip
        """int64 token_ids, slots [N], positions [3, N] -> hidden [N, H], valid until the next call."""
        count, pages = layout.pages.shape
        size = next(size for size in self._sizes if size >= count)
        width = next(width for width in self._widths if width >= pages)
        step = self._sent[: size * (FIRST_PAGE + width)].view(size, -1)
        self._fill(step.numpy(), token_ids, positions, slots, layout)
        self._steps[:size, : FIRST_PAGE + width].copy_(step, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        work = 0 if siblings is None else self._set_work(siblings, layout, size)
        return self._replay(size, width, work)()[:count]

    def _fill(
        self, step: np.ndarray, token_ids: np.ndarray, positions: np.ndarray, slots: np.ndarray, layout: RowLayout
    ) -> None:
        count, pages = layout.pages.shape
        spare = self._cache.spare_page
        if self._copied is not None:
            self._copied.synchronize()  # the last step's copy read this memory
        step[:count, 0], step[:count, 1:4] = token_ids, positions.T
        step[:count, 4], step[:count, 5] = slots, layout.length
        step[:count, FIRST_PAGE : FIRST_PAGE + pages] = layout.pages
        step[count:, : FIRST_PAGE + 1] = (0, 0, 0, 0, spare * self._cache.page_size, 1, spare)

    def _set_work(self, siblings: Siblings, layout: RowLayout, size: int) -> int:
        """Fills the buffer; returns how much of it a graph is to go through. Rows that fill up a batch get no items."""
        found = items(siblings, layout.length)
        padded = min(1 << (max(len(found), size) - 1).bit_length(), len(self._work))
        self._work[: len(found)].copy_(_tensor(found))
        self._work[len(found) : padded] = -1
        return padded

    def _replay(self, size: int, width: int, work: int) -> Callable[[], Tensor]:
        key = (size, width, work)
        if key not in self._replays:
            self._replays[key] = self._captured(*key) if self._capture else lambda: self._forward(*key)
        return self._replays[key]

    def _captured(self, size: int, width: int, work: int) -> Callable[[], Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), self._stream
        assert stream is not None
        with _CAPTURING:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._forward(size, width, work)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
                hidden = self._forward(size, width, work)

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay

    def _forward(self, size: int, width: int, work: int) -> Tensor:
        siblings = replace(Siblings.strangers(size), work=self._work[:work]) if work else None
        token_ids, *positions, slots, lengths = self._steps[:size, :FIRST_PAGE].t().contiguous()
        tables = self._steps[:size, FIRST_PAGE : FIRST_PAGE + width]
        attention = _InPlace(self._cache, slots, tables, lengths, siblings, self._impl)
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
