"""The page pool and the radix tree against a naive model, under random operations, checked after each."""

from __future__ import annotations

import random

import pytest

from tests.engine.tiny import PAD, image
from vtengine.engine.embedded.pages import PagePool
from vtengine.engine.embedded.radix import RadixTree, page_keys, token_keys

SIZE = 3


def cut(keys, num_tokens):
    """The page keys of the first tokens."""
    tokens = [token for key in keys for token in key][:num_tokens]
    return tuple(tuple(tokens[i : i + SIZE]) for i in range(0, len(tokens), SIZE))


class NaiveTree:
    """Every known prefix with its page and its last use; eviction looks at all of them."""

    def __init__(self):
        self.pages, self.used, self.time = {}, {}, 0

    def _touch(self, keys):
        self.time += 1
        for n in range(1, len(keys) + 1):
            self.used[keys[:n]] = self.time

    def match(self, keys):
        """The longest known prefix, in page keys."""
        num_tokens = sum(map(len, keys))
        prefixes = [cut(keys, n) for n in range(num_tokens, 0, -1)]
        found = next((p for p in prefixes if p in self.pages), ())
        self._touch(found)
        return found

    def pages_of(self, keys):
        return [self.pages[keys[:n]] for n in range(1, len(keys) + 1)]

    def insert(self, keys, pages):
        for n, page in enumerate(pages, 1):
            self.pages.setdefault(keys[:n], page)
        self._touch(keys)

    def evict(self, count, in_use):
        for _ in range(count):
            parents = {prefix[:-1] for prefix in self.pages}
            leaves = [p for p, page in self.pages.items() if p not in parents and page not in in_use]
            if not leaves:
                return
            del self.pages[min(leaves, key=self.used.__getitem__)]


class Machine:
    """Sequences that hold pages of the tree and own ones, as the scheduler's do."""

    def __init__(self, seed, num_pages=24):
        self.random = random.Random(seed)
        self.pool = PagePool(num_pages, SIZE)
        self.tree = RadixTree(self.pool)
        self.naive = NaiveTree()
        self.held = []  # (keys, pages, tokens known at the start)
        self.taken = 0

    def keys(self):
        """Few distinct pages, so that prefixes are shared often; the last one may be short."""
        tokens = [self.random.randrange(2) if n % SIZE == 0 else n for n in range(self.random.randrange(1, 24))]
        return cut([tokens], len(tokens))

    def start(self):
        keys = self.keys()
        known, naive = self.tree.match(keys), self.naive.match(keys)
        assert known == (self.naive.pages_of(naive), sum(map(len, naive)))
        self.tree.lock(known.pages)
        needed = len(keys) - len(known.pages)
        if self.pool.num_available < needed:
            return self.tree.unlock(known.pages)
        missing = max(0, needed - self.pool.num_free)
        in_use = {page for _, pages, _ in self.held for page in pages} | set(known.pages)
        assert self.tree.evict(missing) == missing
        self.naive.evict(missing, in_use)
        if known.num_tokens % SIZE:
            self.tree.take(known.pages[-1])
            del self.naive.pages[naive]
            self.taken += 1
        self.held.append((keys, known.pages + self.pool.allocate(needed), known.num_tokens))
        return None

    def end(self):
        if self.held:
            keys, pages, num_known = self.held.pop(self.random.randrange(len(self.held)))
            num_computed = self.random.randint(num_known, sum(map(len, keys)))  # less than all: it was cancelled
            computed = cut(keys, num_computed)
            known = set(self.naive.pages)
            new = self.tree.insert(computed, pages[: len(computed)])
            self.naive.insert(computed, pages[: len(computed)])
            assert new == len(set(self.naive.pages) - known)
            self.pool.release(pages)

    def evict(self):
        count = self.random.randrange(4)
        in_use = {page for _, pages, _ in self.held for page in pages}
        self.tree.evict(count)
        self.naive.evict(count, in_use)

    def update_weights(self):
        for _, pages, _ in self.held:
            self.pool.release(pages)
        self.held.clear()
        self.tree.clear()
        self.naive.pages.clear()

    def step(self):
        operations = (self.start, self.end, self.evict, self.update_weights)
        self.random.choices(operations, weights=(50, 40, 9, 1))[0]()
        self.pool.check_integrity([pages for _, pages, _ in self.held], self.tree.pages())
        self.tree.check_integrity()
        assert sorted(self.tree.pages()) == sorted(self.naive.pages.values())


@pytest.mark.parametrize("seed", range(12))
def test_random_operations_agree_with_the_naive_model(seed):
    machine = Machine(seed, num_pages=12 + 4 * seed)
    for _ in range(400):
        machine.step()
    assert machine.taken > 5


def test_pages_are_bounded_and_counted():
    pool = PagePool(4, 8)
    pages = pool.allocate(3)
    assert pool.num_free == 1 and pool.pages_for(17) == 3 and pool.pages_for(0) == 0
    with pytest.raises(AssertionError, match="2 pages wanted, 1 free"):
        pool.allocate(2)
    pool.retain(pages)
    pool.release(pages)
    assert pool.num_free == 1
    pool.release(pages)
    assert pool.num_free == 4
    with pytest.raises(AssertionError, match="released too often"):
        pool.release(pages)
    with pytest.raises(ValueError, match="page_size = 0"):
        PagePool(4, 0)


def test_images_that_differ_never_match():
    a, b, wide = image(1), image(2), image(1, h=6, w=4)
    ids = (7, *[PAD] * 6, 8)
    keys = [token_keys(ids, (x,), PAD) for x in (a, b, wide)]
    assert all(first == 7 and last == 8 for first, *_, last in keys)
    middle = [key for row in keys for key in row[1:-1]]
    assert len(set(middle)) == 18 and max(middle) < 0
    assert keys[0] == token_keys(ids, (image(1),), PAD)


def test_only_full_pages_have_keys():
    assert page_keys([1, 2, 3, 4, 5], 2) == [(1, 2), (3, 4)]
    assert page_keys([1], 2) == []


def test_least_recently_used_goes_first_and_locked_stays():
    pool = PagePool(3, 1)
    tree = RadixTree(pool)
    for key in range(3):
        pages = pool.allocate(1)
        tree.insert([(key,)], pages)
        pool.release(pages)
    tree.match([(0,)])
    locked = tree.match([(1,)]).pages
    tree.lock(locked)
    assert tree.evict(1) == 1 and tree.match([(2,)]).pages == []
    assert tree.evict(5) == 1 and tree.match([(0,)]).pages == []
    assert tree.match([(1,)]).pages == locked
    tree.unlock(locked)
    assert tree.evict(1) == 1 and pool.num_free == 3


def test_what_was_taken_out_is_forgotten():
    """A tree that never evicts must not remember every conversation that it ever had."""
    pool = PagePool(8, 4)
    tree = RadixTree(pool)
    for turn in range(500):
        pages = pool.allocate(1)
        tree.insert([(1, turn)], pages)
        pool.release(pages)
        known = tree.match([(1, turn, 7, 8)])
        assert known == (pages, 2)
        tree.lock(known.pages)
        tree.take(pages[0])
        pool.release(pages)
    assert tree.num_pages == 0 and pool.num_free == 8 and len(tree._queue) < 100
