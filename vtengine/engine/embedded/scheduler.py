"""What runs in the next forward pass: continuous batching over a bounded pool of pages. Integers only, no tensors.

Each step has a token budget. Running sequences come first, oldest first: one token for each that decodes, then chunks
of prompts. What is left of the budget admits waiting ones, oldest first, if their pages are there. A decoding sequence
that needs a page when none is left preempts the youngest: its pages go to the radix tree and it waits again with all
its tokens, so it continues where it was. Old is a sequence by its conversation: a second turn comes before the first
turns of those that began later. None starves: a conversation's age never falls behind new ones.

A pass may be scheduled while the one before it runs: the tokens that are being sampled count, only their ids are not
known. A sequence may be found to have ended when one token too many of it is on its way: that one is nobody's, and the
pages are free at once, since passes run one after the other. Whoever ends knows all tokens that are in its pages; only
the one sampled last can be unknown, and to continue later, as a preempted sequence does, it must be known as well:
`must_preempt` says beforehand whether somebody will have to give way.

The full pages of a prompt are published to the tree when they are scheduled, not when they are computed: every layer
writes its keys and values before it attends, so siblings admitted in the same step already read them. The last page of
a sequence, unfilled, goes to the tree with its end: a next turn computes the token sampled last, and what is new.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from vtengine.engine.base import Finish
    from vtengine.engine.embedded.pages import PagePool
    from vtengine.engine.embedded.radix import Known, RadixTree
    from vtengine.engine.embedded.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens start..start+count-1 of a sequence; `samples`: the last of them gives the next token."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


class Scheduler:
    """resume False: prefixes are neither published nor matched."""

    def __init__(
        self, pool: PagePool, tree: RadixTree, *, max_batch_tokens: int, max_running: int, resume: bool = True
    ) -> None:
        self.pool = pool
        self.tree = tree
        self.max_batch_tokens = max_batch_tokens
        self.resume = resume
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.counters: Counter[str] = Counter()
        self._slots = list(range(max_running - 1, -1, -1))

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running)

    @property
    def must_preempt(self) -> bool:
        """Whether those that decode need more pages than they can get."""
        size = self.pool.page_size
        decoding = (s for s in self.running if s.num_remaining == 1 and not s.is_full)
        growing = sum(s.num_computed == len(s.pages) * size for s in decoding)
        return growing > self.pool.num_available

    def submit(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_rank)

    def schedule(self, admit: bool = True, held: bool = True) -> list[Row]:
        """The rows of the next pass; empty only if nothing can run.

        admit False: nothing new begins. held False: no held sequence does.
        """
        rows = self._decodes()
        budget = self.max_batch_tokens - len(rows)
        for sequence in self.running:
            if sequence.num_remaining > 1 and budget > 0:
                rows.append(self._chunk(sequence, budget))
                budget -= rows[-1].count
        while budget > 0 and self._slots and (first := self._next(admit, held)) and self._admit(first):
            self.waiting.remove(first)
            rows.append(self._chunk(first, budget))
            budget -= rows[-1].count
        return rows

    def _next(self, admit: bool, held: bool) -> Sequence | None:
        """The oldest that may leave the queue. A preempted one may: it ends with the weights that it began with."""
        return next((s for s in self.waiting if (admit or s.cached_tokens >= 0) and (held or not s.held)), None)

    def launched(self, rows: list[Row]) -> None:
        """Call once the pass is on its way, before the tokens that it samples are appended."""
        for row in rows:
            row.sequence.num_computed += row.count
            row.sequence.num_pending += row.samples

    def finish(self, sequence: Sequence, finish: Finish) -> None:
        """Takes a running or waiting sequence out; what was computed of it stays in the tree."""
        sequence.finish = finish
        sequence.features.clear()
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._free_slot(sequence)
        self._release(sequence)

    def restart(self, without: Collection[Sequence]) -> None:
        """A pass came to nothing: takes sequences out; the others begin again, and nothing of it stays in the tree."""
        for sequence in list(self.running):
            self._preempt(sequence, keep=False)  # its pages may be in the tree that were never computed
        self.tree.clear()
        for sequence in without:
            self.waiting.remove(sequence)

    def drop_all(self) -> list[Sequence]:
        """Forgets every sequence and the whole tree; returns the sequences that had not finished."""
        dropped = [*self.running, *self.waiting]
        for sequence in self.running:
            self.pool.release(sequence.pages)
            sequence.pages.clear()
            self._free_slot(sequence)
        self.running.clear()
        self.waiting.clear()
        self.tree.clear()
        return dropped

    def _decodes(self) -> list[Row]:
        rows: list[Row] = []
        page_size = self.pool.page_size
        for sequence in list(self.running):
            if sequence.slot < 0 or sequence.num_remaining != 1 or sequence.is_full:
                continue
            if sequence.num_computed == len(sequence.pages) * page_size and not self._grow(sequence):
                break  # the youngest left gave way itself
            rows.append(Row(sequence, sequence.num_computed, 1, True))
        return rows

    def _grow(self, sequence: Sequence) -> bool:
        """One more page, if need be a younger sequence's; False: the sequence itself was preempted."""
        while not self._reserve(1):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages += self.pool.allocate(1)
        return True

    def _reserve(self, count: int) -> bool:
        """Makes `count` pages free by eviction, or evicts nothing."""
        if self.pool.num_available < count:
            return False
        if self.pool.num_free < count:
            self.tree.evict(count - self.pool.num_free)
        return True

    def _preempt(self, sequence: Sequence, keep: bool = True) -> None:
        assert not sequence.num_pending
        self.counters["preemptions"] += 1
        self.counters["recomputed_tokens"] += sequence.num_computed
        self.running.remove(sequence)
        self._free_slot(sequence)
        self._release(sequence, keep)
        insort(self.waiting, sequence, key=_rank)

    def _chunk(self, sequence: Sequence, budget: int) -> Row:
        count = min(sequence.num_remaining, budget)
        end = sequence.num_computed + count
        self._publish(sequence, end)
        return Row(sequence, sequence.num_computed, count, end == len(sequence.tokens))

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence the pages of all its tokens, known ones from the tree; False: they are not there."""
        known = self.known(sequence)
        self.tree.lock(known.pages)
        needed = self.pool.pages_for(len(sequence.tokens)) - len(known.pages)
        if self.pool.num_available < needed + len(self.running) or not self._reserve(needed):
            self.tree.unlock(known.pages)
            return False
        sequence.num_shared = known.num_tokens // self.pool.page_size
        for unfilled in known.pages[sequence.num_shared :]:
            self.tree.take(unfilled)
        sequence.pages = known.pages + self.pool.allocate(needed)
        sequence.num_computed = known.num_tokens
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = sequence.num_computed
            self.counters["prompt_tokens"] += sequence.num_prompt
            self.counters["cached_tokens"] += sequence.cached_tokens
        else:
            self.counters["recomputed_tokens"] -= sequence.num_computed
        sequence.slot = self._slots.pop()
        insort(self.running, sequence, key=_rank)
        return True

    def known(self, sequence: Sequence) -> Known:
        """What the tree has of the beginning of a waiting sequence; its last token is always computed."""
        keys = sequence.page_keys(len(sequence.tokens) - 1, self.pool.page_size) if self.resume else ()
        return self.tree.match(keys)

    def _free_slot(self, sequence: Sequence) -> None:
        self._slots.append(sequence.slot)
        sequence.slot = -1

    def _publish(self, sequence: Sequence, end: int) -> None:
        """Makes the full pages among the first `end` tokens known, unless another sequence was first with one."""
        count = end // self.pool.page_size
        if not self.resume or count <= sequence.num_shared:
            return
        keys = sequence.page_keys(count * self.pool.page_size, self.pool.page_size)
        if self.tree.match(keys).num_tokens // self.pool.page_size == sequence.num_shared:
            self.tree.insert(keys, sequence.pages[:count])
            sequence.num_shared = count

    def _release(self, sequence: Sequence, keep: bool = True) -> None:
        """Gives all pages back. keep: what was computed stays in the tree."""
        if self.resume and keep:
            assert sequence.num_computed >= sequence.num_shared * self.pool.page_size
            keys = sequence.page_keys(sequence.num_computed, self.pool.page_size)
            self.tree.insert(keys, sequence.pages[: len(keys)])
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.num_shared = sequence.num_computed = 0

    def check_integrity(self) -> None:
        """Asserts that pages, tree and sequences agree. Between steps only."""
        held = [sequence.pages for sequence in self.running]
        self.pool.check_integrity(held, self.tree.pages())
        self.tree.check_integrity()
        assert all(not s.pages and s.slot < 0 for s in self.waiting)
        slots = [s.slot for s in self.running] + self._slots
        assert sorted(slots) == list(range(len(slots)))
        for sequence in self.running:
            assert len(sequence.pages) * self.pool.page_size >= sequence.num_computed
            assert sequence.num_remaining >= 1
            if self.resume:
                shared = sequence.page_keys(sequence.num_shared * self.pool.page_size, self.pool.page_size)
                assert self.tree.match(shared).pages == sequence.pages[: sequence.num_shared]


def _rank(sequence: Sequence) -> tuple[float, int]:
    return sequence.rank
