"""How a suite measures: interleaved rounds, medians, wall and CPU time.

One after another, two candidates see two different machines (clocks, neighbours, caches); in interleaved rounds with a
rotating order they see the same one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Name = TypeVar("Name")


@dataclass(frozen=True)
class Measurement:
    """Seconds per call over all rounds. `cpu_s` is the process's CPU time (all its threads), median."""

    median_s: float
    min_s: float
    p90_s: float
    cpu_s: float
    rounds: int


@dataclass(frozen=True)
class Context:
    """What a suite is given. `quick`: do as little as shows that it works. `results`: the folder of results."""

    quick: bool
    results: Path

    def compare(
        self,
        candidates: Mapping[Name, Callable[[], object]],
        *,
        rounds: int = 7,
        warmup: int = 1,
        min_round_s: float = 0.0,
        after: Callable[[], object] | None = None,
    ) -> dict[Name, Measurement]:
        """Times each candidate once per round, the order rotating from round to round.

        min_round_s: a short candidate is repeated within its round until about this time is filled (the number of
        repetitions is fixed in the warm-up). after: called, and timed, after each candidate (for example a device
        synchronisation). In a quick context there are at most two rounds.
        """
        if rounds < 1:
            raise ValueError(f"rounds = {rounds}: must be at least 1")
        rounds = min(rounds, 2) if self.quick else rounds
        names = list(candidates)
        calls = {name: self._calls(candidates[name], warmup, min_round_s, after) for name in names}
        wall: dict[Name, list[float]] = {name: [] for name in names}
        cpu: dict[Name, list[float]] = {name: [] for name in names}
        for index in range(rounds):
            for name in names[index % len(names) :] + names[: index % len(names)]:
                seconds, busy = _time(candidates[name], calls[name], after)
                wall[name].append(seconds)
                cpu[name].append(busy)
        return {name: summarise(wall[name], cpu[name]) for name in names}

    def _calls(
        self, run: Callable[[], object], warmup: int, min_round_s: float, after: Callable[[], object] | None
    ) -> int:
        seconds = 0.0
        for _ in range(max(warmup, 1 if min_round_s else 0)):
            seconds, _busy = _time(run, 1, after)
        fill = min_round_s / 10 if self.quick else min_round_s
        return max(1, round(fill / max(seconds, 1e-9))) if fill else 1


def summarise(wall: list[float], cpu: list[float]) -> Measurement:
    """The measurement of a list of rounds (seconds per call)."""
    ordered = sorted(wall)
    p90 = ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]
    return Measurement(statistics.median(wall), ordered[0], p90, statistics.median(cpu), len(wall))


def _time(run: Callable[[], object], calls: int, after: Callable[[], object] | None) -> tuple[float, float]:
    wall, busy = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
        if after is not None:
            after()
    return (time.perf_counter() - wall) / calls, (time.process_time() - busy) / calls
