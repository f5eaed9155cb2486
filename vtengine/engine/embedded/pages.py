"""Bookkeeping of the KV pages: who holds which page. Integers only, no tensors.

A page holds the keys and values of `page_size` consecutive tokens. It is free (no holder), held by sequences, held by
the radix tree, or by both. A page that only the tree holds is *idle*: it can be given back by evicting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class PagePool:
    """A bounded pool of pages 0..num_pages-1 with reference counts. Not thread-safe."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be >= 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._cached = [False] * num_pages
        self._num_idle = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that an allocation can get, with eviction."""
        return len(self._free) + self._num_idle

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def allocate(self, count: int) -> list[int]:
        """`count` free pages, each with one holder. Asserts that they are there: look at num_free first."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        if count == 0:
            return []
        pages = self._free[-count:][::-1]
        del self._free[-count:]
        for page in pages:
            self._holders[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more holder for each page; the pages must be held already."""
        for page in pages:
            holders = self._holders[page]
            assert holders > 0, f"page {page} is free"
            self._holders[page] = holders + 1
            self._num_idle -= holders == 1 and self._cached[page]

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each page; pages without a holder become free."""
        for page in pages:
            holders = self._holders[page] - 1
            assert holders >= 0, f"page {page} was released too often"
            self._holders[page] = holders
            if holders == 0:
                assert not self._cached[page], f"page {page}: the tree's own hold was released"
                self._free.append(page)
            else:
                self._num_idle += holders == 1 and self._cached[page]

    def adopt(self, page: int) -> None:
        """The tree becomes a holder of a page that a sequence holds."""
        assert self._holders[page] > 0 and not self._cached[page]
        self._cached[page] = True
        self._holders[page] += 1

    def disown(self, page: int) -> None:
        """The tree lets go of a page."""
        assert self._cached[page]
        self._num_idle -= self._holders[page] == 1
        self._cached[page] = False
        self.release((page,))

    def check_integrity(self, held: Iterable[Iterable[int]], cached: Iterable[int]) -> None:
        """Asserts that the counts are those of the page tables in `held` and of the tree's pages `cached`."""
        expected = [0] * self.num_pages
        for table in held:
            for page in table:
                expected[page] += 1
        in_tree = list(cached)
        assert len(in_tree) == len(set(in_tree)), "a page is in the tree twice"
        for page in in_tree:
            expected[page] += 1
        assert expected == self._holders, "holders differ from the page tables and the tree"
        assert set(in_tree) == {p for p, c in enumerate(self._cached) if c}
        assert sorted(self._free) == [p for p, n in enumerate(expected) if n == 0], "free list differs from the counts"
        assert self._num_idle == sum(expected[page] == 1 for page in in_tree)
