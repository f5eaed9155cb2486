"""What several engines count (`Backend.stats`) as the figures of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from vtengine.engine.base import GAUGES


def total(living: Iterable[Mapping[str, float]], gone: Iterable[Mapping[str, float]] = ()) -> dict[str, float]:
    """Sums; weight_version is the oldest of those that live (of all, where none does).

    gone: last figures of engines that have ended. What they counted stays counted; of their gauges nothing is left.
    """
    living, gone = list(living), list(gone)
    sums: Counter[str] = Counter()
    for figures in living:
        sums.update(figures)
    for figures in gone:
        sums.update({name: 0.0 if name in GAUGES else value for name, value in figures.items()})
    versions = [figures["weight_version"] for figures in living or gone if "weight_version" in figures]
    return {name: float(value) for name, value in sums.items()} | {"weight_version": min(versions, default=0.0)}
