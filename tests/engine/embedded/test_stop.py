"""Stop strings over tokens that split them, hold them whole, or hold half a character."""

from __future__ import annotations

import pytest

from vtengine.engine.embedded.stop import StopFinder

PIECES = {
    1: b"</",
    2: b"ans",
    3: b"wer",
    4: b">",
    5: b"x</answer>y",
    6: b"",
    7: b" a",
    8: b"\xc3",
    9: b"\xa9",
    10: b"er>tail",
}


class Bytes:
    def __init__(self):
        self.calls = 0

    def decode(self, token_ids):
        self.calls += 1
        return b"".join(PIECES[t] for t in token_ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("token_ids", "stops", "end"),
    [
        ([7, 1, 2, 3, 4, 7], ("</answer>",), 5),
        ([7, 1, 2, 3, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 4], ("</answer>",), 19),
        ([7, 5, 7], ("</answer>",), 2),
        ([1, 2, 7, 3, 4], ("</answer>",), None),
        ([7, 8, 9, 7], ("é",), 3),
        ([1, 2, 10], ("never", "</anser>"), 3),
        ([7, 7], (" a a",), 2),
    ],
)
def test_the_token_that_completes_a_stop_string_is_found(token_ids, stops, end):
    finder = StopFinder(Bytes())
    found = [n for n in range(1, len(token_ids) + 1) if finder.found(token_ids[:n], stops)]
    assert (found[0] if found else None) == end


def test_tokens_that_cannot_end_a_stop_string_are_decoded_once():
    decoder = Bytes()
    finder = StopFinder(decoder)
    for _ in range(100):
        assert not finder.found([2] * 50, ("</answer>",))
    assert decoder.calls == 1
