"""The order in which examples are drawn: shuffled anew each epoch, a pure function of seed and number of draws."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vtengine_training.errors import Refused


class Sampler:
    """Draws example numbers, each once per epoch, without end. `drawn` is the whole state.

    Quarantined examples are passed over from then on; they still count as drawn, so the order of the others stays.
    """

    def __init__(self, size: int, seed: int, drawn: int = 0, quarantined: Iterable[int] = ()) -> None:
        if size < 1:
            raise ValueError(f"data: {size} examples; there must be at least 1")
        self.size, self.seed, self.drawn = size, seed, drawn
        self.quarantined = set(quarantined)
        self.reason = ""
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def epoch(self) -> float:
        """Epochs drawn so far, with their fraction."""
        return self.drawn / self.size

    def draw(self) -> tuple[int, int]:
        """(number of the draw, example). Raises Refused when every example is in quarantine."""
        if len(self.quarantined) >= self.size:
            self.check_drawn()
        while True:
            number = self.drawn
            self.drawn += 1
            example = int(self._permutation(number // self.size)[number % self.size])
            if example not in self.quarantined:
                return number, example

    def check_drawn(self) -> None:
        """Raises Refused when every example that was drawn so far is in quarantine."""
        tried = min(self.drawn, self.size)
        if len(self.quarantined) >= tried:
            tried_of = f"all {tried}" if tried == self.size else f"all {tried} (of {self.size})"
            last = f"; the last one: {self.reason}" if self.reason else ""
            raise Refused(f"data: {tried_of} examples are in quarantine: none can be asked{last}")

    def quarantine(self, example: int, reason: str = "") -> None:
        """Never draws this example again."""
        self.quarantined.add(example)
        self.reason = reason or self.reason

    def state(self) -> dict[str, object]:
        """Plain data for `restore`."""
        return {"drawn": self.drawn, "quarantined": sorted(self.quarantined)}

    @staticmethod
    def restore(size: int, seed: int, state: dict[str, object]) -> Sampler:
        """Goes on where `state` was taken."""
        drawn, quarantined = state["drawn"], state["quarantined"]
        assert isinstance(drawn, int) and isinstance(quarantined, list)
        return Sampler(size, seed, drawn, quarantined)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.size)
        return self._order[1]
