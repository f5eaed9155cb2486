"""The scheduler with a toy machine in place of the model: every slot remembers the prefix it was computed from."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.engine.tiny import request
from vtengine.engine.embedded.pages import PagePool
from vtengine.engine.embedded.radix import RadixTree
from vtengine.engine.embedded.scheduler import Scheduler
from vtengine.engine.embedded.sequence import Sequence

VOCAB = 3


def next_token(tokens):
    return hash(tuple(tokens)) % VOCAB


def expected_output(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class ToyEngine:
    """Writes hash(prefix) to each computed slot, and insists that a row finds the whole of its prefix in its pages."""

    def __init__(self, num_pages=16, page_size=2, max_batch_tokens=8, max_running=6, resume=True, overlap=False):
        """overlap: what a step samples is known to the scheduler when the next one was launched."""
        self.overlap = overlap
        self.flight = None
        self.pool = PagePool(num_pages, page_size)
        limits = {"max_batch_tokens": max_batch_tokens, "max_running": max_running, "resume": resume}
        self.scheduler = Scheduler(self.pool, RadixTree(self.pool), **limits)
        self.memory = [None] * (num_pages * page_size)
        self.written = {}  # tokens of each sequence as the machine knows them
        self.done = []

    def submit(self, prompt, count, began_s=None, stops=()):
        item = request(f"r{random.random()}", prompt, began_s=began_s, max_new_tokens=count, stop_token_ids=stops)
        positions = np.zeros((3, len(prompt)), dtype=np.int64)
        sequence = Sequence(item, list(prompt), (), positions, delta=0, seed=0, submitted_s=0.0)
        self.scheduler.submit(sequence)
        self.written[sequence] = list(prompt)
        return sequence

    def slot(self, sequence, position):
        return sequence.pages[position // self.pool.page_size] * self.pool.page_size + position % self.pool.page_size

    def step(self, admit=True):
        if self.flight is not None and self.scheduler.must_preempt:
            self.land()
        rows = self.scheduler.schedule(admit)
        assert sum(row.count for row in rows) <= self.scheduler.max_batch_tokens
        written = [self.slot(row.sequence, p) for row in rows for p in range(row.start, row.start + row.count)]
        assert len(written) == len(set(written)), "two rows write the same slot"
        for row in rows:
            tokens = self.written[row.sequence]
            for position in range(row.start, row.start + row.count):
                self.memory[self.slot(row.sequence, position)] = hash(tuple(tokens[: position + 1]))
        for row in rows:
            tokens = self.written[row.sequence]
            for position in range(row.start + row.count):
                assert self.memory[self.slot(row.sequence, position)] == hash(tuple(tokens[: position + 1]))
        self.scheduler.launched(rows)
        sampled = [(row.sequence, next_token(self.written[row.sequence])) for row in rows if row.samples]
        for sequence, token in sampled:
            self.written[sequence].append(token)
        self.land()
        self.flight = sampled
        if not self.overlap:
            self.land()
        self.scheduler.check_integrity()
        return rows

    def land(self):
        sampled, self.flight = self.flight or [], None
        for sequence, token in sampled:
            if sequence.finish is None:
                sampling = sequence.request.sampling
                sequence.append(token, 0.0)
                if token in sampling.stop_token_ids:
                    self.finish(sequence, "stop")
                elif len(sequence.logprobs) == sampling.max_new_tokens:
                    self.finish(sequence, "length")

    def finish(self, sequence, reason):
        self.scheduler.finish(sequence, reason)
        self.done.append(sequence)

    def run(self):
        steps = 0
        while not self.scheduler.idle:
            in_flight = self.flight
            assert self.step() or in_flight, "nothing could run, but requests are waiting"
            steps += 1
        return steps


def check_output(sequence):
    output = sequence.tokens[sequence.num_prompt :]
    count = sequence.request.sampling.max_new_tokens if sequence.finish == "length" else len(output)
    assert output == expected_output(sequence.request.token_ids, count)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(16))
def test_random_traffic_in_a_tiny_pool(seed, overlap):
    """Submissions, stops, cancellations and failures at random; preemption and eviction happen by themselves."""
    rng = random.Random(seed)
    engine = ToyEngine(
        num_pages=rng.choice((10, 14, 40)),
        page_size=rng.choice((1, 2, 3)),
        max_batch_tokens=rng.choice((6, 9, 64)),
        resume=seed % 4 != 3,
        overlap=overlap,
    )
    room = engine.pool.num_pages * engine.pool.page_size
    for _ in range(250):
        live = [*engine.scheduler.running, *engine.scheduler.waiting]
        action = rng.random()
        if action < 0.35 and len(live) < 12:
            shared = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, room // 2))]
            if engine.done and rng.random() < 0.5:  # a next turn
                earlier = rng.choice(engine.done[-4:]).tokens
                shared = [*earlier, *shared][: max(len(earlier) + 1, room // 2)]
            shared = shared[: room - 1]
            began_s = rng.choice((None, -1.0, 1.0))
            stops = rng.choice(((), (), (0,)))
            engine.submit(shared, rng.randrange(1, room - len(shared) + 2), began_s, stops)
        elif action < 0.4 and live:
            engine.finish(rng.choice(live), "cancelled")
        elif action < 0.41:
            for sequence in engine.scheduler.drop_all():
                sequence.finish = "error"
            engine.flight = None
        else:
            engine.step()
        engine.scheduler.check_integrity()
    engine.run()
    assert engine.done
    for sequence in engine.done:
        check_output(sequence)
    if engine.scheduler.resume and engine.pool.num_pages == 10:
        assert engine.scheduler.counters["preemptions"] > 0


def test_siblings_submitted_together_prefill_their_prompt_once():
    engine = ToyEngine(num_pages=64, page_size=4, max_batch_tokens=64)
    siblings = [engine.submit([1] * 22, 5) for _ in range(5)]
    rows = engine.step()
    assert [row.count for row in rows] == [22, 2, 2, 2, 2]
    engine.run()
    assert [s.cached_tokens for s in siblings] == [0, 20, 20, 20, 20]


def test_siblings_of_a_chunked_prompt_prefill_it_once_too():
    engine = ToyEngine(num_pages=64, page_size=4, max_batch_tokens=8)
    siblings = [engine.submit([1] * 22, 5) for _ in range(5)]
    engine.run()
    assert [s.cached_tokens for s in siblings] == [0, 20, 20, 20, 20]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("length", range(1, 22))
def test_a_second_turn_computes_nothing_again(length, overlap):
    """The token sampled last was never computed, unless the step after it was on its way already."""
    engine = ToyEngine(num_pages=64, page_size=4, max_batch_tokens=16, overlap=overlap)
    first = engine.submit([1] * length, 3)
    engine.run()
    second = engine.submit([*first.tokens, 2, 0, 2], 2)
    engine.run()
    assert second.cached_tokens == len(first.tokens) - 1
    third = engine.submit([*second.tokens, 1], 2)
    engine.run()
    assert third.cached_tokens == len(second.tokens) - 1


@pytest.mark.parametrize("together", [False, True])
def test_of_several_that_go_on_from_a_turn_one_fills_up_its_last_page(together):
    engine = ToyEngine(num_pages=64, page_size=4, max_batch_tokens=64)
    first = engine.submit([1] * 8, 3)
    engine.run()
    turns = []
    for token in range(3):
        turns.append(engine.submit([*first.tokens, token, token], 2))
        if not together:
            engine.run()
    engine.run()
    assert [turn.cached_tokens for turn in turns] == [10, 8, 8]
    for turn in turns:
        check_output(turn)


def test_who_is_preempted_goes_on_where_it_was():
    engine = ToyEngine(num_pages=64, page_size=4, max_batch_tokens=64)
    sequence = engine.submit([1] * 6, 8)
    engine.step(), engine.step()
    engine.scheduler._preempt(sequence)
    rows = engine.step()
    assert [(row.start, row.count) for row in rows] == [(7, 1)]
    assert engine.scheduler.counters["recomputed_tokens"] == 0
    engine.run()
    check_output(sequence)


def test_preemption_takes_the_youngest_and_changes_nothing():
    engine = ToyEngine(num_pages=8, page_size=2, max_batch_tokens=32)
    sequences = [engine.submit([k, k + 1], 12) for k in range(3)]
    engine.run()
    assert engine.scheduler.counters["preemptions"] > 0
    assert engine.done[0] is sequences[0]
    for sequence in sequences:
        check_output(sequence)


def test_what_has_begun_ends_while_nothing_new_begins():
    """So that a weight update, which waits for the running ones, finds no half-made completion in the queue."""
    engine = ToyEngine(num_pages=8, page_size=2, max_batch_tokens=32)
    begun = [engine.submit([k, k + 1], 12) for k in range(3)]
    while not engine.scheduler.counters["preemptions"]:
        engine.step()
    late = engine.submit([7, 8], 2)
    while engine.step(admit=False):
        pass
    assert set(engine.done) == set(begun) and engine.scheduler.waiting == [late]
    engine.run()
    assert engine.done[-1] is late


def test_the_oldest_conversation_comes_first_and_gives_way_last():
    engine = ToyEngine(num_pages=8, page_size=2, max_batch_tokens=32, max_running=2)
    first, other, later = (engine.submit([k, 1], 12, began_s=began) for k, began in enumerate((2.0, 3.0, 4.0)))
    engine.step()
    second_turn = engine.submit([5, 1], 12, began_s=1.0)
    assert engine.scheduler.waiting == [second_turn, later]
    engine.run()
    assert engine.scheduler.counters["preemptions"] > 0
    assert engine.done.index(second_turn) < engine.done.index(other) < engine.done.index(later)
    for sequence in (first, other, second_turn, later):
        check_output(sequence)


def test_what_is_held_lets_others_pass():
    engine = ToyEngine(num_pages=64, page_size=4, max_batch_tokens=64)
    held, free = engine.submit([1, 2], 2, began_s=1.0), engine.submit([2, 1], 2, began_s=2.0)
    held.held = True
    assert [row.sequence for row in engine.scheduler.schedule(held=False)] == [free]
    assert engine.scheduler.waiting == [held]


def test_without_resume_nothing_is_kept():
    engine = ToyEngine(resume=False)
    for _ in range(2):
        sequence = engine.submit([1, 2, 1, 2], 3)
        engine.run()
        assert sequence.cached_tokens == 0
    assert engine.pool.num_free == engine.pool.num_pages


def test_decoding_goes_on_while_a_long_prompt_is_prefilled():
    engine = ToyEngine(num_pages=64, page_size=4, max_batch_tokens=8)
    short = engine.submit([1], 12)
    engine.step()
    engine.submit([2] * 60, 1)
    for _ in range(4):
        rows = engine.step()
        assert rows[0].sequence is short and rows[0].count == 1
        assert rows[1].count == 7
