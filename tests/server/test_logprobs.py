"""`logprobs: true` through OpenAI's client: which tokens, whole and streamed, cut, empty, from every kind of engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.running import CALL, MODEL, Running, WatchedScript, ask, make_setting, running
from tests.server.test_completions import joined
from tests.server.test_refusals import error_of
from tests.server.test_text_only import over_sglang
from tests.tiny_model import byte_encoder
from vtengine.engine.base import Completion, OnTokens, Request
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.server.logprobs import LEAST, char_spans
from vtengine.server.splitter import content_places, split_reply

Serve = Callable[..., Running]
SAID = "<think>né.</think><answer> né. </answer>"


class Counting(WatchedScript):
    """The k-th token of a reply has the logprob -k, the first one none that JSON could hold."""

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        done = await super().generate(request, on_tokens)
        return replace(done, logprobs=(-math.inf, *(-float(k) for k in range(1, len(done.token_ids)))))


@pytest.fixture
def merged() -> Tokenizer:
    """The end of the answer shares a token with what comes after it."""
    return Tokenizer(byte_encoder((("n", "Ã"), (".", "<")), tags=()))


@pytest.fixture
def counting(merged: Tokenizer) -> Iterator[Running]:
    def reply(request: Request) -> str:
        text = merged.decode(request.token_ids)
        if "call" in text:
            return CALL if len(request.images) == 1 else SAID.replace(" né. ", "ok.")
        return "plain <b> words " if "plain" in text else SAID

    with running(make_setting(Counting(merged, reply), merged, profile="glance")) as server:
        yield server


def create(server: Running, question: str = "What?", **options: Any) -> Any:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": question}], "logprobs": True}
    return server.client().chat.completions.create(**(asked | options))


def tokens(choice: Any) -> list[tuple[bytes, float]]:
    for token in choice.logprobs.content:
        assert token.top_logprobs == [] and token.token == bytes(token.bytes).decode("utf-8", "replace")
    return [(bytes(token.bytes), token.logprob) for token in choice.logprobs.content]


def streamed(server: Running, question: str = "What?", **options: Any) -> tuple[str, list[tuple[bytes, float]]]:
    chunks = list(create(server, question, stream=True, **options))
    (one,) = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].logprobs is not None]
    assert one is chunks[-2].choices[0] and one.finish_reason is None
    return joined(chunks, "content"), tokens(one)


def first_of_the_answer(tokenizer: Tokenizer) -> int:
    pieces = [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode_trusted(SAID)]
    assert pieces.count(b"n\xc3") == 2, "in the thought, and in the answer"
    return pieces.index(b"n\xc3", pieces.index(b"n\xc3") + 1)


def test_the_tokens_of_the_answer_alone(counting: Running, merged: Tokenizer) -> None:
    first = first_of_the_answer(merged)
    choice = create(counting).choices[0]
    assert choice.message.content == "né."
    expected = [(b"n\xc3", -float(first)), (b"\xa9", -float(first + 1)), (b".", -float(first + 2))]
    assert tokens(choice) == expected
    assert [token.token for token in choice.logprobs.content] == ["n\ufffd", "\ufffd", "."]
    assert streamed(counting) == ("né.", expected)


def test_a_token_on_the_border_is_given_whole(counting: Running) -> None:
    """Of the second turn alone; its `.` is one token with the beginning of the closing tag."""
    choice = create(counting, messages=ask("call")).choices[0]
    assert choice.message.content == "ok." and [piece for piece, _ in tokens(choice)] == [b"o", b"k", b".<"]
    assert streamed(counting, messages=ask("call")) == ("ok.", tokens(choice))


def test_what_a_stop_cuts_away_has_none(counting: Running) -> None:
    for stop, content in (("é", "n"), (".", "né"), ("n", "")):
        choice = create(counting, stop=stop).choices[0]
        assert choice.message.content == content
        assert len(tokens(choice)) == {"n": 1, "né": 2, "": 0}[content]
        assert streamed(counting, stop=stop) == (content, tokens(choice))


def test_replies_without_tags_without_content_and_cut_ones(counting: Running, merged: Tokenizer) -> None:
    plain = create(counting, "plain").choices[0]
    assert plain.message.content == "plain <b> words"
    assert b"".join(piece for piece, _ in tokens(plain)) == b"plain <b> words" and tokens(plain)[0][1] == LEAST
    assert streamed(counting, "plain") == ("plain <b> words", tokens(plain))
    called = create(counting, messages=ask("call"), extra_body={"vtengine": {"max_turns": 1}}).choices[0]
    assert (called.message.content, called.logprobs.content) == ("", [])
    cut = create(counting, max_tokens=first_of_the_answer(merged) + 1).choices[0]
    assert (cut.finish_reason, cut.message.content) == ("length", "n\ufffd") and len(tokens(cut)) == 1


def test_every_choice_has_its_own_and_nobody_who_did_not_ask(counting: Running) -> None:
    reply = create(counting, n=3)
    assert [tokens(choice) for choice in reply.choices] == [tokens(reply.choices[0])] * 3
    found = [chunk.choices[0] for chunk in create(counting, n=3, stream=True)]
    assert sorted(choice.index for choice in found if choice.logprobs) == [0, 1, 2]
    assert create(counting, logprobs=False).choices[0].logprobs is None
    assert all(chunk.choices[0].logprobs is None for chunk in create(counting, logprobs=None, stream=True))


def test_the_stream_helper_of_the_client_adds_them_up(counting: Running) -> None:
    messages: Any = [{"role": "user", "content": "What?"}]
    with counting.client().chat.completions.stream(model=MODEL, messages=messages, logprobs=True) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.message.content == "né." and tokens(choice) == tokens(create(counting).choices[0])


def test_of_the_sampled_token_alone(counting: Running) -> None:
    assert create(counting, top_logprobs=0).choices[0].logprobs.content
    error = error_of(counting, logprobs=True, top_logprobs=2)
    assert error.param == "top_logprobs" and "engines give the logprob of the sampled token alone" in str(error)


def test_those_of_sglang(tokenizer: Tokenizer) -> None:
    with over_sglang(tokenizer) as (server, _):
        choice = create(server, seed=1).choices[0]
        content, found = streamed(server, seed=1)
    written = b"".join(piece for piece, _ in found).decode("utf-8", "replace")
    assert choice.message.content == content == written != ""
    assert tokens(choice) == found and {logprob for _, logprob in found} == {-0.125}


TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<", "a", " b ", "\n", "é"]


@given(st.lists(st.sampled_from(TAGS), max_size=12).map("".join))
def test_places_are_those_of_the_content(text: str) -> None:
    assert "".join(text[place] for place in content_places(text)) == split_reply(text)[1]


@given(st.binary(max_size=12), st.lists(st.integers(0, 12), max_size=5))
def test_spans_cover_the_text_in_order(data: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(places)]
    spans = list(char_spans(pieces))
    text = data.decode("utf-8", "replace")
    assert {at for start, end in spans for at in range(start, end)} == set(range(len(text)))
    for piece, (start, end) in zip(pieces, spans, strict=True):
        assert not piece or start < end
