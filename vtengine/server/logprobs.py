"""`logprobs` of a choice, as OpenAI's interface has them: those of the tokens that wrote its `content`."""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from vtengine.rollout.episode import Episode, Turn
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.server.account import Json, plain_answer
from vtengine.server.splitter import content_places

LEAST = -9999.0
"""Stands for what JSON has no number for, as at OpenAI."""


def content_logprobs(episode: Episode, tokenizer: Tokenizer, num_chars: int) -> Json:
    """num_chars: how much of the content was handed out; a stop string may have cut it.

    A token counts if it wrote a character of that, or a part of one. It is given as it was sampled, so the first and
    the last one may hold white space or a part of a tag beside it.
    """
    found: list[Json] = []
    for turn, places in zip(episode.turns, _content_places(episode), strict=True):
        found += _tokens(turn, tokenizer, places[:num_chars])
        num_chars -= min(num_chars, len(places))
    return {"content": found, "refusal": None}


def _content_places(episode: Episode) -> list[list[int]]:
    """For each turn, where in its text the content stands."""
    places = [content_places(turn.text) for turn in episode.turns]
    if not any(places) and (plain := plain_answer(episode)):
        end = len(episode.turns[-1].text.rstrip())
        places[-1] = list(range(end - len(plain), end))
    return places


def _tokens(turn: Turn, tokenizer: Tokenizer, places: Sequence[int]) -> Iterator[Json]:
    ids, logprobs = turn.completion.token_ids, turn.completion.logprobs
    pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
    for piece, logprob, (start, end) in zip(pieces, logprobs, char_spans(pieces), strict=True):
        if bisect_left(places, start) < bisect_left(places, end):
            yield {
                "token": piece.decode("utf-8", "replace"),
                "logprob": logprob if logprob > LEAST else LEAST,
                "bytes": list(piece),
                "top_logprobs": [],
            }


def char_spans(pieces: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """start:end in the decoded text of the characters that each piece wrote, or a part of which it wrote."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    start = 0
    for piece in pieces:
        end = start + len(decoder.decode(piece))
        yield start, end + bool(decoder.getstate()[0])
        start = end
