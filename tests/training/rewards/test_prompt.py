"""Cleaning, fencing, and the strict reading of verdicts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vtengine_training.rewards.judge.client import read_reply
from vtengine_training.rewards.judge.injections import INJECTIONS
from vtengine_training.rewards.judge.prompt import Query, build_prompt, clean, parse_verdict

KEY = "0a1b2c3d"
NOT_VERDICTS = [
    *("", "CORRECT", "INCORRECT", KEY, f"{KEY}  CORRECT", f"{KEY} correct", f"{KEY}CORRECT", f"{KEY} CORRECT."),
    *(f"**{KEY} CORRECT**", f"{KEY} CORRECT\n{KEY} INCORRECT", f"Verdict: {KEY} CORRECT", f"{KEY} CORRECT because"),
    *("00000000 CORRECT", "1", "Score: 1", "[[YES]]", f"{KEY} INCORRECT CORRECT", f"<think>{KEY} CORRECT"),
    *(f"<think>a</think>{KEY} CORRECT</think>", f"<think>a</think><think>b</think>{KEY} CORRECT", "{}", "null"),
    f"{KEY.upper()} CORRECT",
]


@pytest.mark.parametrize("reply", NOT_VERDICTS)
def test_what_is_not_exactly_a_verdict_is_none(reply):
    assert parse_verdict(reply, KEY) is None


@pytest.mark.parametrize("before", ["", "\n ", "<think>it says INCORRECT</think>", "<think>\n</think>\n\n"])
@pytest.mark.parametrize(("word", "verdict"), [("CORRECT", True), ("INCORRECT", False)])
def test_verdicts(before, word, verdict):
    assert parse_verdict(f"{before}{KEY} {word}\n", KEY) is verdict


@given(st.text())
def test_no_text_written_before_the_key_is_a_verdict(text):
    prompt = build_prompt(Query.of("q", ["4"], text))
    assert parse_verdict(text, prompt.key) is None


@given(st.text(max_size=200))
def test_the_candidate_stays_on_its_line(text):
    query = Query.of("q", ["4"], text)
    prompt = build_prompt(query)
    lines = prompt.user.split("\n")
    assert len(prompt.user.splitlines()) == len(lines) == 8
    fences = [place for place, line in enumerate(lines) if line.startswith("=====FENCE")]
    assert fences == [3, 5] and lines[3] == lines[5]
    assert json.loads(lines[4]) == query.answer


@given(st.text(max_size=200))
def test_clean_leaves_no_control_character_and_is_stable(text):
    found = clean(text)
    assert found.isprintable() or all(char.isprintable() or char.isspace() for char in found)
    assert clean(found) == found
    found.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a<|im_end|>b", "ab"),
        ("<|im_<|im_end|>end|>x", "x"),
        ("<<|x|>|im_start|>x", "x"),
        ("a</answer>b<think>c", "abc"),
        ("<｜end▁of▁sentence｜>4", "4"),
        ("[INST]4[/INST]</s>", "4"),
        ("4\u200b2", "42"),
        ("a\x00\x1b[1mb", "a[1mb"),
        ("a\u2028b\nc\td", "a b c d"),
        ("a < b | c > d", "a < b | c > d"),
        ("\ud800", ""),
    ],
)
def test_clean(text, kept):
    assert clean(text) == kept


def test_fence_and_key_are_new_each_time():
    query = Query.of("q", ["4"], "4")
    prompts = [build_prompt(query) for _ in range(50)]
    assert len({prompt.key for prompt in prompts}) == len({prompt.user for prompt in prompts}) == 50


@pytest.mark.parametrize(("name", "text"), INJECTIONS, ids=[name for name, _ in INJECTIONS])
def test_injections_neither_break_the_fence_nor_forge_a_verdict(name, text):
    prompt = build_prompt(Query.of("q", ["4"], text))
    assert len(prompt.user.splitlines()) == 8
    assert parse_verdict(text, prompt.key) is None
    assert parse_verdict(clean(text), prompt.key) is None
    assert "<|" not in prompt.user.split("\n")[4]


def body(**changes):
    choice = {"message": {"content": "x"}, "finish_reason": "stop"} | changes
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": -1}}).encode()


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b"{}", b"null", b'"x"', b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": "x"}'),
        *(
            b'{"choices": [{"message": {"content": 1}}]}',
            b'{"choices": [{"message": {"content": null}}]}',
            b"[" * 90_000,
        ),
        *(body(finish_reason="length"), body(finish_reason="content_filter"), b"\xff\xfe", b"x" * 300_000),
    ],
)
def test_a_body_that_is_no_completion_is_a_value_error(data):
    with pytest.raises(ValueError):
        read_reply(data)


def test_usage_is_counted_or_zero():
    found = read_reply(body())
    assert (found.text, found.prompt_tokens, found.completion_tokens) == ("x", 3, 0)
