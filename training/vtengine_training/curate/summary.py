"""What a curation found, in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
UNLABELLED = ("rejected", "unscored")
"""Only a row with one of these labels has a `reason` of ours; others may have one that their data came with."""


def summary(rows: Sequence[Row], left_out: Mapping[str, int]) -> dict[str, Any]:
    """Labels, mean shares of right answers, how the labels agree with a `needs_high` that the data came with.

    left_out: rows of the files that could not be read as examples, by reason.
    """
    scored = [row for row in rows if row["label"] not in UNLABELLED]
    reasons = Counter(row["reason"] for row in rows if row["label"] in UNLABELLED)
    found: dict[str, Any] = {
        "questions": len(rows),
        "left_out": dict(left_out),
        "labels": dict(sorted(Counter(row["label"] for row in rows).items())),
        "reasons": dict(sorted(reasons.items())),
    }
    if scored:
        for view in ("low", "high"):
            share = sum(row[f"{view}_correct"] / row["rollouts"] for row in scored) / len(scored)
            found[f"accuracy_{view}"] = round(share, 4)
        found["correct"] = _table(scored)
    named = [row for row in scored if row["label"] in ("low_is_enough", "needs_high")]
    if named and all(row.get("needs_high") in (0, 1) for row in named):
        right = [row["needs_high"] == (row["label"] == "needs_high") for row in named]
        found["agrees_with_needs_high"] = round(sum(right) / len(right), 4)
    return found


def _table(rows: Sequence[Row]) -> list[list[int]]:
    """[low_correct][high_correct] -> questions."""
    size = max(row["rollouts"] for row in rows) + 1
    counts = [[0] * size for _ in range(size)]
    for row in rows:
        counts[row["low_correct"]][row["high_correct"]] += 1
    return counts
