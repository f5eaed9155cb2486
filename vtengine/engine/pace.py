"""How often streams hand on what was sampled."""

from __future__ import annotations


class Pace:
    """Chooses when streams hand on their tokens, so that all together make at most so many chunks a second.

    Waking a task, encoding an event and a system call cost about as much as computing a token of a small model. Streams
    that are sampled in the same steps share a pace: their event loop is then woken once for all of them, and computes
    on without it in between.
    """

    def __init__(self, chunks_per_s: float | None) -> None:
        """None: every time."""
        self._chunks_per_s = chunks_per_s
        self._next_s = 0.0
        self.is_due = True

    def step(self, now_s: float, streams: int) -> None:
        """Something was sampled, while there were so many streams."""
        if self._chunks_per_s is None:
            return
        self.is_due = now_s >= self._next_s
        if self.is_due:
            self._next_s = now_s + streams / self._chunks_per_s
