"""Decode steps on CUDA, captured once for each batch size and replayed: one launch in place of hundreds.

A graph reads and writes fixed memory, so a step's ids, positions, slots and page tables are copied into buffers that
live as long as the engine. A batch is filled up to the next captured size with rows that write to a page of their own,
which no sequence has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vtengine_kernels.prefix_attention import available, prefix_attention

if TYPE_CHECKING:
    from vtengine.engine.embedded.attention import KVCache, RowLayout
    from vtengine.model import Qwen2_5_VL

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MAX_CONTEXT_TOKENS = 16384
"""Longer sequences decode without a graph."""
WARM_UPS = 2
"""Passes before a capture, which must neither compile a kernel nor set up a library."""


class DecodeGraphs:
    """Graphs by batch size, captured when first needed. Suffixes: N rows, B a captured size >= N, P pages, H hidden.

    capture False runs the same padded pass without a graph: how it is tested where there is no CUDA.
    """

    def __init__(self, model: Qwen2_5_VL, cache: KVCache, max_rows: int, capture: bool = True) -> None:
        self._model, self._cache, self._capture = model, cache, capture
        self._sizes = [*(size for size in BATCH_SIZES if size < max_rows), max_rows]
        device, pages = model.device, -(-MAX_CONTEXT_TOKENS // cache.page_size)
        self._token_ids = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(3, max_rows, dtype=torch.int64, device=device)
        self._slots = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._lengths = torch.ones(max_rows, dtype=torch.int64, device=device)
        self._tables = torch.zeros(max_rows, pages, dtype=torch.int64, device=device)
        self._replays: dict[int, Callable[[], Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle() if capture else None

    @staticmethod
    def of(model: Qwen2_5_VL, cache: KVCache, max_rows: int) -> DecodeGraphs | None:
        """None where graphs cannot be: on a CPU, and without a kernel that reads pages in place."""
        is_possible = model.device.type == "cuda" and available(cache.keys[0])
        return DecodeGraphs(model, cache, max_rows) if is_possible else None

    def takes(self, layout: RowLayout) -> bool:
        """Whether every row is one token, and no context is too long."""
        return bool((layout.count == 1).all()) and layout.pages.shape[1] <= self._tables.shape[1]

    def run(self, token_ids: Tensor, positions: Tensor, slots: Tensor, layout: RowLayout) -> Tensor:
        """token_ids, slots [N], positions [3, N] -> hidden [N, H], valid until the next call."""
        count = len(token_ids)
        size = next(size for size in self._sizes if size >= count)
        self._token_ids[:count].copy_(token_ids)
        self._positions[:, :count].copy_(positions)
        self._slots[:count].copy_(slots)
        self._lengths[:count].copy_(_tensor(layout.length))
        self._tables[:count, : layout.pages.shape[1]].copy_(_tensor(layout.pages))
        spare = self._cache.spare_page
        self._slots[count:size] = spare * self._cache.page_size
        self._lengths[count:size] = 1
        self._tables[count:size, 0] = spare
        return self._replay(size)()[:count]

    def _replay(self, size: int) -> Callable[[], Tensor]:
        replay = self._replays.get(size)
        if replay is None:
            replay = self._replays[size] = self._captured(size) if self._capture else lambda: self._forward(size)
        return replay

    def _captured(self, size: int) -> Callable[[], Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._forward(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            hidden = self._forward(size)

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay

    def _forward(self, size: int) -> Tensor:
        attention = _InPlace(self._cache, self._slots[:size], self._tables[:size], self._lengths[:size])
        embeds = self._model.embed(self._token_ids[:size])
        return self._model.decode(embeds, self._positions[:, :size], attention)


class _InPlace:
    """Attention of single tokens over pages read in place; an attention context (see `vtengine.model.attention`)."""

    def __init__(self, cache: KVCache, slots: Tensor, tables: Tensor, lengths: Tensor) -> None:
        self._cache, self._slots, self._tables, self._lengths = cache, slots, tables, lengths

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self._cache
        cache.write(layer, self._slots, k, v)
        return prefix_attention(q, cache.keys[layer], cache.values[layer], self._tables, self._lengths)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
