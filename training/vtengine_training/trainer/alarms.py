"""What a person should look at, said once when it begins. Pure: metrics in, sentences out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

WINDOW = 10
EDGE = 0.02
"""Upscale ratios within this of 0 or 1 have collapsed."""
DEAD_SPREAD = 0.9
SLOPE = 1.5
"""Growth of the mismatch from the first half of the window to the second that is worth a word."""
NOTICEABLE = 0.01
AGREEMENT = 0.9
"""Share of verdicts that must equal those of the rules, where these decide."""


class Alarms:
    """Looks at each step's metrics; an alarm is returned when it begins, and again only after it has ended.

    asks: whether the policy can ask for another view; without, its upscale ratio is 0 and means nothing.
    """

    def __init__(self, asks: bool = True) -> None:
        self._asks = asks
        self._recent: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self._ringing: set[str] = set()

    def check(self, figures: Mapping[str, float]) -> list[str]:
        """New alarms of this step."""
        self._recent.append(figures)
        conditions = {
            "upscale ratio near 0: the policy no longer asks for the high view": self._asks
            and self._all("upscale/ratio", 0.0, EDGE),
            "upscale ratio near 1: the policy always asks": self._all("upscale/ratio", 1 - EDGE, 1.0),
            "spread is dead: most groups have equal rewards": self._all("groups/zero_spread_ratio", DEAD_SPREAD, 1.0),
            "no group to learn from in this step": figures.get("groups/used") == 0,
            "an update was skipped: loss or gradients were not finite": figures.get("updates/skipped", 0) > 0,
            "the reward function failed": figures.get("groups/reward_failed", 0) > 0,
            "the judge was wrong on known pairs": figures.get("judge/canary_wrong", 0) > 0,
            "the judge gave no verdict on some answers": figures.get("judge/no_verdict", 0) > 0,
            "judge and rules disagree": figures.get("judge/agrees_with_rules", 1.0) < AGREEMENT,
            "trainer and engine log-probabilities drift apart": self._drifts("mismatch/abs_diff"),
        }
        ringing = {text for text, on in conditions.items() if on}
        new = [text for text in conditions if text in ringing - self._ringing]
        self._ringing = ringing
        return new

    def _all(self, name: str, low: float, high: float) -> bool:
        values = [figures[name] for figures in self._recent if name in figures]
        return len(values) == WINDOW and all(low <= value <= high for value in values)

    def _drifts(self, name: str) -> bool:
        values = [figures[name] for figures in self._recent if name in figures]
        half = WINDOW // 2
        if len(values) < WINDOW:
            return False
        return sum(values[half:]) / half > NOTICEABLE and sum(values[half:]) > SLOPE * sum(values[:half])
