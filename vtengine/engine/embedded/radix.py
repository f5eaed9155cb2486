"""Which token prefixes have their KV in which pages: a radix tree with one page of tokens per edge.

Full pages are read by whoever has the same prefix. A leaf may be unfilled: the last page of a sequence that has ended.
Only one can fill it up, so the first that goes on from there takes it out of the tree; others compute its tokens anew.

Keys are token ids, except that an image placeholder is replaced by a number made of the image's content hash, its grid
and the placeholder's offset in the image: prompts that differ only in an image never share a page of it.
"""

from __future__ import annotations

import heapq
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vtengine.engine.base import ImageInput
    from vtengine.engine.embedded.pages import PagePool

PageKey = tuple[int, ...]
_OFFSET_BITS = 32


def token_keys(token_ids: Sequence[int], images: Sequence[ImageInput], image_token_id: int) -> list[int]:
    """One key per token: the id itself, or a negative number of 128 + 32 bits for an image placeholder.

    The placeholders must be as many as the images have visual tokens (checked by the caller).
    """
    placeholders = (key for image in images for key in _image_keys(image))
    return [next(placeholders) if token_id == image_token_id else token_id for token_id in token_ids]


def _image_keys(image: ImageInput) -> range:
    digest = blake2b(repr((image.content_hash, image.grid_thw)).encode(), digest_size=16).digest()
    base = (int.from_bytes(digest, "big") + 1) << _OFFSET_BITS
    return range(-base, -base + image.visual_tokens)


def page_keys(keys: Sequence[int], page_size: int) -> list[PageKey]:
    """The full pages of `keys`; a rest shorter than a page has no key."""
    return [tuple(keys[start : start + page_size]) for start in range(0, len(keys) - page_size + 1, page_size)]


class Known(NamedTuple):
    """A prefix in the tree: its pages, of which the last may be unfilled, and how many tokens it has."""

    pages: list[int]
    num_tokens: int


class _Node:
    """One page. `tick` is the time of the last use; `queued` says that the eviction queue knows the node.

    parent: None once the node is out of the tree.
    """

    __slots__ = ("children", "key", "page", "parent", "queued", "tick")

    def __init__(self, key: PageKey, page: int, parent: _Node | None, tick: int) -> None:
        self.key = key
        self.page = page
        self.parent: _Node | None = parent
        self.children: dict[PageKey, _Node] = {}
        self.tick = tick
        self.queued = False


class RadixTree:
    """Maps page keys to pages of a pool; holds each of its pages once. Least recently used leaves are evicted first.

    Whoever holds a page of the tree holds all pages before it: only then is every idle page evictable.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._root = _Node((), -1, None, 0)
        self._tick = 0
        self._queue: list[tuple[int, int, _Node]] = []
        self._num_queued = 0
        self._unfilled: dict[int, _Node] = {}
        self.num_pages = 0
        self.num_evicted = 0

    def match(self, keys: Sequence[PageKey]) -> Known:
        """The longest known prefix of `keys`, of which the last may be shorter than a page.

        `lock` its pages before anything is allocated. An unfilled one must be taken out before it is written to.
        """
        node, pages, num_tokens = self._root, [], 0
        self._tick += 1
        for key in keys:
            child = node.children.get(key) or _longest_unfilled(node, key)
            if child is None:
                break
            child.tick = self._tick
            pages.append(child.page)
            num_tokens += len(child.key)
            if len(child.key) < self._pool.page_size:
                break
            node = child
        return Known(pages, num_tokens)

    def take(self, page: int) -> None:
        """An unfilled page leaves the tree, for its one other holder to fill it up."""
        assert self._pool.holders(page) == 2
        self._detach(self._unfilled[page])
        if len(self._queue) > 2 * self.num_pages + 64:  # those taken out stay there until they are looked at
            self._queue = [entry for entry in self._queue if entry[2].parent is not None]
            heapq.heapify(self._queue)

    def lock(self, pages: Sequence[int]) -> None:
        """The caller becomes a holder: the pages stay until `unlock`, even if the tree forgets them."""
        self._pool.retain(pages)

    def unlock(self, pages: Sequence[int]) -> None:
        self._pool.release(pages)

    def insert(self, keys: Sequence[PageKey], pages: Sequence[int]) -> int:
        """Makes `pages` (held by the caller) known under `keys`; returns how many were new to the tree.

        The last may be unfilled; its caller writes to it no more. Where a key is known already the tree keeps its own
        page. The caller keeps its holds and releases them itself.
        """
        assert len(keys) == len(pages)
        node, known = self._root, self.num_pages
        self._tick += 1
        for key, page in zip(keys, pages, strict=True):
            child = node.children.get(key)
            if child is None:
                child = self._add(node, key, page)
            child.tick = self._tick
            node = child
        return self.num_pages - known

    def _add(self, parent: _Node, key: PageKey, page: int) -> _Node:
        self._pool.adopt(page)
        node = parent.children[key] = _Node(key, page, parent, self._tick)
        if len(key) < self._pool.page_size:
            self._unfilled[page] = node
        self.num_pages += 1
        self._enqueue(node)
        return node

    def _enqueue(self, node: _Node) -> None:
        node.queued = True
        self._num_queued += 1
        heapq.heappush(self._queue, (node.tick, self._num_queued, node))

    def evict(self, count: int) -> int:
        """Frees up to `count` idle pages, least recently used first and leaves before their parents."""
        freed, in_use = 0, []
        while freed < count and self._queue:
            tick, _, node = heapq.heappop(self._queue)
            node.queued = False
            if node.children or node.parent is None:
                continue  # comes back when its last child goes; or was taken out
            if tick < node.tick:
                self._enqueue(node)
            elif self._pool.holders(node.page) > 1:
                in_use.append(node)
            else:
                self._detach(node)
                freed += 1
        for node in in_use:
            self._enqueue(node)
        self.num_evicted += freed
        return freed

    def _detach(self, node: _Node) -> None:
        parent, node.parent = node.parent, None
        assert parent is not None
        del parent.children[node.key]
        self._unfilled.pop(node.page, None)
        self._pool.disown(node.page)
        self.num_pages -= 1
        if not parent.children and parent is not self._root and not parent.queued:
            self._enqueue(parent)

    def clear(self) -> None:
        """Forgets everything. Pages still locked stay with their holders."""
        for node in self._nodes():
            self._pool.disown(node.page)
        self._root.children.clear()
        self._queue.clear()
        self._unfilled.clear()
        self.num_pages = 0

    def pages(self) -> list[int]:
        return [node.page for node in self._nodes()]

    def _nodes(self) -> Iterator[_Node]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def check_integrity(self) -> None:
        """Asserts the tree's own invariants; the pool checks the counts."""
        nodes = list(self._nodes())
        assert len(nodes) == self.num_pages
        queued = {id(node) for _, _, node in self._queue}
        assert len(queued) == len(self._queue), "a node is queued twice"
        unfilled = {node.page: node for node in nodes if len(node.key) < self._pool.page_size}
        assert unfilled == self._unfilled
        for node in unfilled.values():
            assert node.key and not node.children and self._pool.holders(node.page) == 1, "an unfilled page is in use"
        for node in nodes:
            parent = node.parent
            assert parent is not None
            assert parent is self._root or parent.tick >= node.tick, "used without the page before it"
            assert node.queued == (id(node) in queued)
            assert node.children or node.queued, "a leaf can never be evicted"
            holders = min(self._pool.holders(node.page), 2)
            assert parent is self._root or self._pool.holders(parent.page) >= holders, "held without the page before it"


def _longest_unfilled(node: _Node, key: PageKey) -> _Node | None:
    """The child with the most tokens of `key`, none of them others."""
    lengths = range(len(key) - 1, 0, -1) if node.children else ()
    return next((child for length in lengths if (child := node.children.get(key[:length]))), None)
