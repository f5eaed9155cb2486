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

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vtengine_kernels.prefix_attention import Impl, Siblings, capturable, prefix_attention
from vtengine_kernels.prefix_attention.split import ROWS, SPAN, items

from vtengine.engine.embedded.captures import Captures, batch_sizes
from vtengine.engine.embedded.upload import send

if TYPE_CHECKING:
    from vtengine.engine.embedded.attention import KVCache, RowLayout
    from vtengine.engine.embedded.sampled import Sampled
    from vtengine.model import VLModel

CONTEXT_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
"""What the tables of a graph can hold; longer sequences decode without one."""
FIRST_PAGE = 6
"""Columns of a step before a row's pages: token id, position (3), slot, length."""


class DecodeGraphs:
    """Graphs by batch size and width of the tables. Suffixes: N rows, H hidden."""

    def __init__(self, model: VLModel, cache: KVCache, sampled: Sampled, captures: Captures) -> None:
        self._model, self._cache, self._sampled, self._captures = model, cache, sampled, captures
        self._sizes = batch_sizes(sampled.max_rows)
        most_pages = cache.spare_page  # of a sequence that has all there are
        self._widths = sorted({min(-(-tokens // cache.page_size), most_pages) for tokens in CONTEXT_TOKENS})
        device, numbers = model.device, sampled.max_rows * (FIRST_PAGE + self._widths[-1])
        self._steps = torch.zeros(numbers, dtype=torch.int64, device=device)
        self._sent = torch.zeros(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        most_spans = -(-self._widths[-1] * cache.page_size // SPAN)
        self._work = torch.full((sampled.max_rows * most_spans, 1 + ROWS), -1, device=device)
        self._impl: Impl = capturable(cache.keys[0]) or "auto"

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

    def takes(self, layout: RowLayout) -> bool:
        """Whether every row is one token, and no context is too long."""
        fits = bool((layout.count == 1).all()) and layout.pages.shape[1] <= self._widths[-1]
        return fits and not self._captures.failed

    def run(
        self, token_ids: np.ndarray, positions: np.ndarray, slots: np.ndarray, layout: RowLayout,
        siblings: Siblings | None,
    ) -> Tensor | None:  # fmt: skip
        """int64 token_ids (as `Sampled.known` takes them), slots [N], positions [3, N] -> hidden [N, H].

        It is valid until the next graph is replayed. None: the graph could not be captured.
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
            self._copied.synchronize()  # the last step's copy read this memory; a pass that was taken in came before it
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
        work = np.full((padded, 1 + ROWS), -1)
        work[: len(found)] = found
        send(work, self._work[:padded])
        return padded

    def _replay(self, size: int, width: int, work: int) -> Callable[[], Tensor] | None:
        return self._captures.of(("decode", size, width, work), partial(self._forward, size, width, work))

    def _forward(self, size: int, width: int, work: int) -> Tensor:
        siblings = replace(Siblings.strangers(size), work=self._work[:work]) if work else None
        step = self._steps[: size * (FIRST_PAGE + width)].view(size, -1)
        token_ids, *positions, slots, lengths = step[:, :FIRST_PAGE].t().contiguous()
        attention = _InPlace(self._cache, slots, step[:, FIRST_PAGE:], lengths, siblings, self._impl)
        embeds = self._model.embed(self._sampled.known(token_ids))
        return self._model.decode(embeds, torch.stack(positions), attention)


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
