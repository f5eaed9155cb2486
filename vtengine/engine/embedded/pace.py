"""How often streams hand on what was sampled."""

from __future__ import annotations


class Pace:
    """Chooses the steps after which streams hand on their tokens, so that all together make at most so many chunks.

    They share the steps: the event loop is then woken once for all of them, and computes on without it in between.
    """

    def __init__(self, chunks_per_s: float | None) -> None:
        """None: after every step."""
        self._chunks_per_s = chunks_per_s
        self._next_s = 0.0
        self.is_due = True

    def step(self, now_s: float, streams: int) -> None:
        """A step has ended that sampled for so many streams."""
        if self._chunks_per_s is None:
            return
        self.is_due = now_s >= self._next_s
        if self.is_due:
            self._next_s = now_s + streams / self._chunks_per_s
