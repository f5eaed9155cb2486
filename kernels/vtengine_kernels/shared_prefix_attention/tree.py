"""Packed tokens as a tree of segments, in depth-first order: whatever continues a segment lies right behind it."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class PrefixTree:
    """lengths: tokens of each segment, at least 1. parents: the segment that each one continues, or -1.

    Depth-first order: a segment's parent is the one before it or one of that one's ancestors.
    A group is (P, r_1, ..., r_n) with parents (-1, 0, ..., 0); unrelated sequences are all -1.
    Raises ValueError for anything else. Hashable, so that plans can be kept.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.parents):
            raise ValueError(f"{len(self.lengths)} lengths for {len(self.parents)} parents: must be equally many")
        path: list[int] = []
        for segment, (length, parent) in enumerate(zip(self.lengths, self.parents, strict=True)):
            if length < 1:
                raise ValueError(f"lengths[{segment}] = {length}: must be at least 1")
            while path and path[-1] != parent:
                path.pop()
            if parent != -1 and not path:
                raise ValueError(
                    f"parents[{segment}] = {parent}: must be -1, or the segment before or one of its ancestors "
                    "(depth-first order)"
                )
            path.append(segment)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """[S + 1]: the first token of each segment, then their number."""
        offsets = [0]
        for length in self.lengths:
            offsets.append(offsets[-1] + length)
        return tuple(offsets)

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]

    @functools.cached_property
    def ancestors(self) -> tuple[tuple[int, ...], ...]:
        """Per segment, the segments above it, the root first."""
        above: list[tuple[int, ...]] = []
        for parent in self.parents:
            above.append(() if parent < 0 else (*above[parent], parent))
        return tuple(above)

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """Per segment, the token behind its last descendant."""
        ends = list(self.offsets[1:])
        for segment in range(len(ends) - 1, -1, -1):
            parent = self.parents[segment]
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[segment])
        return tuple(ends)
