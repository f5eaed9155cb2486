"""One forward pass for the rows of a step: packs prompts' chunks and decoding tokens, encodes images, samples.

Nothing here waits for the device, but for images that were not encoded ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vtengine_kernels.prefix_attention import capturable

from vtengine.engine.embedded.attention import KVCache, PagedAttention, RowLayout, Scratch, gather_slots
from vtengine.engine.embedded.captures import Captures
from vtengine.engine.embedded.decode_graphs import DecodeGraphs
from vtengine.engine.embedded.encoder import Encoder
from vtengine.engine.embedded.families import Families
from vtengine.engine.embedded.head import Head
from vtengine.engine.embedded.sampled import Fetched, Sampled
from vtengine.engine.embedded.upload import upload

if TYPE_CHECKING:
    from vtengine.engine.embedded.scheduler import Row
    from vtengine.engine.embedded.sequence import Sequence
    from vtengine.model import VLModel


@dataclass(frozen=True)
class Flight:
    """A pass that was launched, and what it samples: for each row that samples, in order."""

    rows: list[Row]
    sampled: Fetched


class Runner:
    """Owns the model, the KV tensors, and a table [max_running, P] with the page table of each running sequence."""

    def __init__(
        self, model: VLModel, cache: KVCache, encoder: Encoder, max_running: int, share_prefix: bool | None = None,
        cuda_graphs: bool = True,
    ) -> None:  # fmt: skip
        self.model = model
        self.cache = cache
        self.encoder = encoder
        self._tables = np.zeros((max_running, 64), dtype=np.int64)
        self._synced: list[tuple[list[int] | None, int]] = [(None, 0)] * max_running
        self._scratch = Scratch()
        self._families = Families.for_cache(cache.keys[0], cache.page_size, share_prefix)
        self._sampled = Sampled(max_running, model.device)
        self.use(Captures(model.device) if cuda_graphs and capturable(cache.keys[0]) is not None else None)

    def use(self, captures: Captures | None) -> None:
        """Decode steps and sampling go through these; None: there are no graphs."""
        self.captures = captures
        self._graphs = None if captures is None else DecodeGraphs(self.model, self.cache, self._sampled, captures)
        self._head = Head(self.model, self._sampled, captures)

    def warm_up(self) -> None:
        """Captures graphs and has kernels compiled on CUDA, so that no request waits for it.

        To be called in the thread that launches, on the model's device.
        """
        if self._graphs is not None:
            self._graphs.capture()
            self._head.capture()
        if self.model.device.type == "cuda":
            self._warm_up_pass()
            self._head.warm_up()
            torch.cuda.empty_cache()  # what was there before the captures is their stream's, which no other may use

    @torch.inference_mode()
    def _warm_up_pass(self) -> None:
        """Rows of every kind, over the page that no sequence has: a prompt, a later part, a short part, one token."""
        count, length = np.array([32, 32, 2, 1]), np.array([32, 64, 34, 33])
        spare = np.full((len(count), -(-int(length.max()) // self.cache.page_size)), self.cache.spare_page)
        layout = RowLayout(np.cumsum(count) - count, count, length, spare, [[row] for row in range(len(count))])
        zeros, slots = np.zeros((4, count.sum()), dtype=np.int64), gather_slots(layout, self.cache.page_size)
        (ids, *places), slots_T = upload((zeros, slots), self.model.device)
        attention = PagedAttention(self.cache, layout, slots_T, self._scratch, self._families)
        self.model.decode(self.model.embed(ids), torch.stack(places), attention)
        self._families.forget()

    @torch.inference_mode()
    def launch(self, rows: list[Row]) -> Flight:
        """Computes the rows, and samples for those that want it.

        A token that is not known yet must be one that the pass launched before this one samples.
        """
        sequences = [row.sequence for row in rows if row.samples]
        sample = self._head.prepare(sequences) if sequences else None
        hidden = self._pass(rows)
        if sample is not None:
            sample(hidden)
        for place, sequence in enumerate(sequences):
            sequence.place = place
        return Flight(rows, self._sampled.fetch(len(sequences)))

    def _pass(self, rows: list[Row]) -> Tensor:
        """hidden [n, H] of the rows that sample, if any does."""
        layout = self._layout(rows)
        slots = gather_slots(layout, self.cache.page_size)
        token_ids, positions = self._inputs(rows)
        features, last = self._features(rows), self._last_tokens(rows, layout)
        if self._graphs is not None and features is None and self._graphs.takes(layout):
            hidden = self._graphs.run(token_ids, positions, slots, layout, self._families.of(layout.held))
            if hidden is not None:
                return hidden if last is None else hidden.index_select(0, last)
        shown = np.flatnonzero(token_ids == self.model.config.image_token_id)
        ids, places, slots_T, shown_V = upload((token_ids, positions, slots, shown), self.model.device)
        if (token_ids < 0).any():
            ids = self._sampled.known(ids)
        attention = PagedAttention(self.cache, layout, slots_T, self._scratch, self._families)
        return self.model.decode(self.model.embed(ids, features, shown_V), places, attention, last)

    def _layout(self, rows: list[Row]) -> RowLayout:
        count = np.array([row.count for row in rows], dtype=np.int64)
        length = np.array([row.start for row in rows], dtype=np.int64) + count
        slots = [self._sync(row.sequence) for row in rows]
        num_pages = -(-int(length.max()) // self.cache.page_size)
        held = [row.sequence.pages for row in rows]
        return RowLayout(np.cumsum(count) - count, count, length, self._tables[slots, :num_pages], held)

    def _sync(self, sequence: Sequence) -> int:
        """Brings the sequence's row of the tables up to date; returns its slot."""
        slot, pages = sequence.slot, sequence.pages
        owner, synced = self._synced[slot]
        if owner is not pages:
            synced = 0
        if synced < len(pages):
            if len(pages) > self._tables.shape[1]:
                self._tables = np.pad(self._tables, ((0, 0), (0, max(len(pages), self._tables.shape[1]))))
            self._tables[slot, synced : len(pages)] = pages[synced:]
            self._synced[slot] = (pages, len(pages))
        return slot

    def _inputs(self, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
        """int64 (token ids [T], as `Sampled.known` takes them, positions [3, T])."""
        token_ids: list[int] = []
        pieces: list[np.ndarray] = []
        text: list[int] = []  # positions of consecutive one-token rows, the usual case in decoding
        for row in rows:
            sequence, start = row.sequence, row.start
            end = start + row.count
            if row.count == 1 and start >= sequence.num_prompt:
                is_known = start < len(sequence.tokens)
                token_ids.append(sequence.tokens[start] if is_known else Sampled.of(sequence.place))
                text.append(start + sequence.delta)
                continue
            if text:
                pieces.append(_text_positions(text))
                text = []
            token_ids += sequence.tokens[start:end]
            pieces.append(sequence.positions[:, start:end])
            if end > sequence.num_prompt:
                begin = max(start, sequence.num_prompt)
                pieces.append(_text_positions(range(begin + sequence.delta, end + sequence.delta)))
        if text:
            pieces.append(_text_positions(text))
        positions = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
        return np.array(token_ids, dtype=np.int64), np.ascontiguousarray(positions)

    def _features(self, rows: list[Row]) -> Tensor | None:
        """The visual features of the image placeholders in the rows [V, H], in order; None if there are none."""
        wanted = [
            (row, index)
            for row in rows
            if row.start < row.sequence.num_prompt
            for index, span in enumerate(row.sequence.spans)
            if span.begin < row.start + row.count and span.end > row.start
        ]
        if not wanted:
            return None
        self.encoder.encode((row.sequence, index) for row, index in wanted if index not in row.sequence.features)
        pieces = []
        for row, index in wanted:
            span, features = row.sequence.spans[index], row.sequence.features[index]
            end = row.start + row.count
            pieces.append(features[max(row.start - span.begin, 0) : end - span.begin])
            if end >= span.end:
                del row.sequence.features[index]
        return torch.cat(pieces)

    def _last_tokens(self, rows: list[Row], layout: RowLayout) -> Tensor | None:
        """The last token of each row that samples; None: every token of the pass is one."""
        sampling = np.array([row.samples for row in rows])
        if sampling.all() and (layout.count == 1).all():
            return None
        last = (layout.begin + layout.count - 1)[sampling]
        return upload([last], self.model.device)[0]

    def forget(self) -> None:
        """Drops the visual features, the keys and values, and every reference to sequences."""
        self.encoder.cache.clear()
        self.cache.reset()
        self._head.forget()
        self._families.forget()
        self._synced = [(None, 0)] * len(self._synced)


def _text_positions(positions: list[int] | range) -> np.ndarray:
    return np.broadcast_to(np.array(positions, dtype=np.int64), (3, len(positions)))
