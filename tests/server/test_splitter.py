"""The stream's reading of tags against the protocol's own, for every way of cutting a reply into pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.server.running import ANSWER, CALL
from vtengine.protocol.reply import parse_reply
from vtengine.server.splitter import ReplySplitter, StopCutter, split_reply

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>"]
replies = st.lists(st.sampled_from([*TAGS, "<", "</", "a", " b ", "\n", "<answer", "é<b>"]), max_size=12).map("".join)


def split_in_pieces(text: str, cuts: list[int]) -> tuple[str, str]:
    splitter, parts = ReplySplitter(), {"reasoning_content": "", "content": ""}
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(places):
        for channel, piece in splitter.push(text[start:end]):
            parts[channel] += piece
    for channel, piece in splitter.flush():
        parts[channel] += piece
    return parts["reasoning_content"], parts["content"]


@given(replies, st.lists(st.integers(0, 10_000), max_size=20))
@example("<answer>x<think>y</think>z</answer>", [])
@example("</think><answer>a</answer>", [3])
def test_content_is_the_answer_however_it_is_cut(text: str, cuts: list[int]) -> None:
    pieces = split_in_pieces(text, cuts)
    assert pieces == split_reply(text)
    reply = parse_reply(text)
    if reply.answer is not None:
        assert pieces[1] == reply.answer
    if reply.call is not None:
        assert pieces[1] == "" and "<tool_call>" in pieces[0]


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        (ANSWER, "now I see", "a red ball"),
        (CALL, CALL.replace("<think>", "").replace("</think>", ""), ""),
        ("<answer>cut off in the mid", "", "cut off in the mid"),
        ("<think>cut <answer>off</answer>", "cut <answer>off</answer>", ""),
        ("plain words", "plain words", ""),
        ("<think>a</think><answer></answer>", "a", ""),
    ],
)
def test_examples(text: str, reasoning: str, content: str) -> None:
    assert split_reply(text) == (reasoning, content)


def test_letters_are_not_held_back() -> None:
    splitter = ReplySplitter()
    assert splitter.push("<think>1 < 2")[0].text == "1 < 2"
    assert splitter.push(" and </thi") == [("reasoning_content", " and ")]
    assert splitter.push("s is no tag")[0].text == "</this is no tag"


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3), st.integers(1, 5))
def test_stops_cut_before_the_first(text: str, stops: list[str], size: int) -> None:
    cutter = StopCutter(tuple(stops))
    out = "".join(cutter.push(text[i : i + size]) for i in range(0, len(text), size)) + cutter.flush()
    places = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    assert out == text[: min(places, default=(0, len(text)))[1]]
