"""What the rows of a run add up to. Rows are untrusted: a missing or odd value counts as nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

UNFINISHED = ("rejected", "failed")
"""Statuses of rows that could not be asked, or not to the end: neither right nor wrong."""


@dataclass(frozen=True)
class Totals:
    """Sums over rows. `resumed_tokens` were in the cache when a later turn of their episode began.

    statuses: (status, rows); codes: (error code, rows) of the rejected and failed ones; both most frequent first.
    unscored: of these, those with an accepted answer. answered: rows with a reply; looked: of these, those that were
    shown an image.
    """

    rows: int = 0
    statuses: tuple[tuple[str, int], ...] = ()
    codes: tuple[tuple[str, int], ...] = ()
    scored: int = 0
    correct: int = 0
    unscored: int = 0
    answered: int = 0
    looked: int = 0
    upscaled: int = 0
    visual_tokens: int = 0
    visual_tokens_full: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    resumed_tokens: int = 0
    later_prompt_tokens: int = 0
    completion_tokens: int = 0

    @staticmethod
    def of(rows: Iterable[Mapping[str, Any]]) -> Totals:
        counter = TotalsCounter()
        for row in rows:
            counter.add(row)
        return counter.totals()

    @property
    def accuracy(self) -> float | None:
        """Share of right answers among the rows that were asked and have an accepted answer; None without such rows."""
        return self.correct / self.scored if self.scored else None

    @property
    def upscale_ratio(self) -> float | None:
        """Share of the rows with an image and a reply in which the model asked for more pixels."""
        return self.upscaled / self.looked if self.looked else None

    @property
    def visual_ratio(self) -> float | None:
        """Visual tokens spent, as a share of what always showing the high view would have cost."""
        return self.visual_tokens / self.visual_tokens_full if self.visual_tokens_full else None

    @property
    def unfinished(self) -> int:
        """Rows that were rejected or failed."""
        return sum(count for status, count in self.statuses if status in UNFINISHED)

    @property
    def left_out(self) -> str:
        """What is said behind the accuracy of the rows that it leaves out."""
        return f"; {self.unscored:,} rejected or failed left out" if self.unscored else ""


class TotalsCounter:
    """Adds rows up one by one, for runs that do not fit into memory."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._statuses: Counter[str] = Counter()
        self._codes: Counter[str] = Counter()

    def add(self, row: Mapping[str, Any]) -> None:
        sums = self._sums
        sums["rows"] += 1
        self._statuses[str(row.get("status"))] += 1
        if row.get("status") in UNFINISHED:
            error = row.get("error")
            self._codes[str(error.get("code")) if isinstance(error, Mapping) else "unknown"] += 1
            sums["unscored"] += bool(_list(row.get("expected")))
        elif isinstance(row.get("correct"), bool):
            sums["scored"] += 1
            sums["correct"] += row["correct"]
        turns = [turn for turn in _list(row.get("turns")) if isinstance(turn, Mapping)]
        if not turns:
            return
        sums["answered"] += 1
        sums["looked"] += any(_list(turn.get("images")) for turn in turns)
        sums["upscaled"] += row.get("upscaled") is True
        sums["visual_tokens"] += _count(row.get("visual_tokens"))
        sums["visual_tokens_full"] += _count(row.get("visual_tokens_full"))
        for number, turn in enumerate(turns):
            sums["prompt_tokens"] += _count(turn.get("prompt_tokens"))
            sums["cached_tokens"] += _count(turn.get("cached_tokens"))
            sums["completion_tokens"] += _count(turn.get("completion_tokens"))
            if number:
                sums["resumed_tokens"] += _count(turn.get("cached_tokens"))
                sums["later_prompt_tokens"] += _count(turn.get("prompt_tokens"))

    def totals(self) -> Totals:
        statuses, codes = (tuple(counter.most_common()) for counter in (self._statuses, self._codes))
        return Totals(statuses=statuses, codes=codes, **self._sums)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
