"""One forward pass for the rows of a step: packs prompts' chunks and decoding tokens, encodes images, samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vtengine.engine.embedded.attention import KVCache, PagedAttention, RowLayout, Scratch, gather_slots
from vtengine.engine.embedded.decode_graphs import DecodeGraphs
from vtengine.engine.embedded.encoder import Encoder
from vtengine.engine.embedded.families import Families
from vtengine.engine.embedded.sampler import SamplingPlan, sample
from vtengine.engine.embedded.upload import upload

if TYPE_CHECKING:
    from vtengine.engine.embedded.scheduler import Row
    from vtengine.engine.embedded.sequence import Sequence
    from vtengine.model import VLModel


class Runner:
    """Owns the model, the KV tensors, and a table [max_running, P] with the page table of each running sequence."""

    def __init__(
        self, model: VLModel, cache: KVCache, encoder: Encoder, max_running: int, share_prefix: bool | None = None,
        cuda_graphs: bool = True,
    ) -> None:  # fmt: skip
        self.model = model
        self.cache = cache
        self.encoder = encoder
        config = model.config
        self._banned = [config.image_token_id, config.video_token_id]
        self._tables = np.zeros((max_running, 64), dtype=np.int64)
        self._synced: list[tuple[list[int] | None, int]] = [(None, 0)] * max_running
        self._scratch = Scratch()
        self._families = Families.for_cache(cache.keys[0], cache.page_size, share_prefix)
        self.graphs = DecodeGraphs.of(model, cache, max_running) if cuda_graphs else None
        self._plan: tuple[tuple[int, ...], SamplingPlan] | None = None

    @torch.inference_mode()
    def run(self, rows: list[Row]) -> tuple[list[int], list[float]]:
        """Computes the rows; returns a sampled id and its logprob for each row that samples, in order."""
        sequences = [row.sequence for row in rows if row.samples]
        sampling = self._sampling(sequences) if sequences else None  # before the pass: what it sends waits for no pass
        layout = self._layout(rows)
        slots = gather_slots(layout, self.cache.page_size)
        token_ids, positions = self._inputs(rows)
        features, sampled = self._features(rows), self._sampled_tokens(rows, layout)
        hidden = None
        if self.graphs is not None and features is None and self.graphs.takes(layout):
            hidden = self.graphs.run(token_ids, positions, slots, layout, self._families.of(layout.held))
            if hidden is not None and sampled is not None:
                hidden = hidden.index_select(0, sampled)
        if hidden is None:
            shown = np.flatnonzero(token_ids == self.model.config.image_token_id)
            ids, places, slots_T, shown_V = upload((token_ids, positions, slots, shown), self.model.device)
            attention = PagedAttention(self.cache, layout, slots_T, self._scratch, self._families)
            hidden = self.model.decode(self.model.embed(ids, features, shown_V), places, attention, sampled)
        return ([], []) if sampling is None else self._sample(sequences, hidden, *sampling)

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
        """int64 (token ids [T], positions [3, T])."""
        token_ids: list[int] = []
        pieces: list[np.ndarray] = []
        text: list[int] = []  # positions of consecutive one-token rows, the usual case in decoding
        for row in rows:
            sequence, start = row.sequence, row.start
            end = start + row.count
            if row.count == 1 and start >= sequence.num_prompt:
                token_ids.append(sequence.tokens[start])
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

    def _sampled_tokens(self, rows: list[Row], layout: RowLayout) -> Tensor | None:
        """The last token of each row that samples; None: every token of the pass is one."""
        sampling = np.array([row.samples for row in rows])
        if sampling.all() and (layout.count == 1).all():
            return None
        last = (layout.begin + layout.count - 1)[sampling]
        return upload([last], self.model.device)[0]

    def _sampling(self, sequences: list[Sequence]) -> tuple[SamplingPlan, Tensor | None]:
        """The plan of these sequences and their random numbers of this step."""
        key = tuple(s.arrival for s in sequences)
        if self._plan is None or self._plan[0] != key:
            params = [s.request.sampling for s in sequences]
            seeds = [s.seed for s in sequences]
            vocab = self.model.config.text.vocab_size
            self._plan = key, SamplingPlan.build(params, seeds, self._banned, vocab, self.model.device)
        plan = self._plan[1]
        return plan, plan.draws(np.array([s.num_outputs for s in sequences], dtype=np.uint64))

    def _sample(
        self, sequences: list[Sequence], hidden: Tensor, plan: SamplingPlan, draws: Tensor | None
    ) -> tuple[list[int], list[float]]:
        ids, found = sample(self.model.scores(hidden), plan, draws)
        logprobs = found.tolist()
        for sequence, logprob in zip(sequences, logprobs, strict=True):
            if math.isnan(logprob):  # the id is then arbitrary, and what was cached may hold NaN too
                raise FloatingPointError(
                    f"request {sequence.request.request_id}: the model's scores are not finite: its weights overflow "
                    f"in {self.model.dtype}; load it in float32, or take a checkpoint from before the training diverged"
                )
        return ids.tolist(), logprobs

    def forget(self) -> None:
        """Drops the visual features, the keys and values, and every reference to sequences."""
        self.encoder.cache.clear()
        self.cache.reset()
        self._plan = None
        self._families.forget()
        self._synced = [(None, 0)] * len(self._synced)


def _text_positions(positions: list[int] | range) -> np.ndarray:
    return np.broadcast_to(np.array(positions, dtype=np.int64), (3, len(positions)))
