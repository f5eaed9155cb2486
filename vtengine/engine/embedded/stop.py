"""Does the newest token complete a stop string?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


# Sets of stop strings that are remembered; callers use one or two, strangers could send any number.
MAX_STOP_SETS = 32


class Decoder(Protocol):
    """The one method of a tokenizer that the engine needs."""

    def decode(self, token_ids: Sequence[int]) -> str: ...


class StopFinder:
    """Decodes only the tail that a stop string can span, and only after a token that can end one."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._enders: dict[tuple[str, ...], dict[int, bool]] = {}

    def found(self, output_ids: Sequence[int], stops: tuple[str, ...]) -> bool:
        """output_ids: all sampled ids of the request, the newest last; earlier ones completed no stop string."""
        if not self._can_end(output_ids[-1], stops):
            return False
        longest = max(len(stop) for stop in stops)
        begin = len(output_ids)
        text = ""
        while begin > 0 and len(text) < 2 * longest:  # tokens may decode to nothing, or to parts of a character
            begin = max(0, begin - longest - 4)
            text = self._decoder.decode(output_ids[begin:])
        return any(stop in text for stop in stops)

    def _can_end(self, token_id: int, stops: tuple[str, ...]) -> bool:
        if stops not in self._enders and len(self._enders) == MAX_STOP_SETS:
            self._enders.clear()
        known = self._enders.setdefault(stops, {})
        answer = known.get(token_id)
        if answer is None:
            text = self._decoder.decode([token_id])
            answer = known[token_id] = "\ufffd" in text or any(_completes(text, stop) for stop in stops)
        return answer


def _completes(text: str, stop: str) -> bool:
    """Whether `text` holds the stop string or begins with an end of it (spaces at its start may be lost)."""
    starts = (text, text.lstrip(" "), " " + text)
    return stop in text or any(start.startswith(stop[k:]) for start in starts for k in range(len(stop)))
