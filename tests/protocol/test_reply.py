"""What a reply says, tag by tag."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtengine.protocol.messages import View
from vtengine.protocol.profile import load_profile, shipped_profiles
from vtengine.protocol.reply import parse_reply
from vtengine.protocol.tools import CROP, RESIZE_CALL, ToolCall

CALL = f"<tool_call>{RESIZE_CALL.to_json()}</tool_call>"


@pytest.mark.parametrize(
    ("text", "answer", "flaws"),
    [
        ("<think>a</think><answer>5</answer>", "5", ()),
        ("  <think>a</think>\n so \n<answer>\n 5 \n</answer>\n", "5", ()),
        ("<think></think><answer>0</answer>", "0", ()),
        ("<answer>5</answer>", "5", ("think_missing",)),
        ("hm <think>a</think><answer>5</answer>", "5", ("text_before_think",)),
        ("<think>a</think><answer>5</answer> done", "5", ("text_after_answer",)),
        (f"<think>maybe {CALL}</think><answer>5</answer>", "5", ("tags_in_think",)),
        ("<think>a<think>b</think><answer>5</answer>", "5", ("tags_in_think",)),
        ("<think>a</think><think>b</think><answer>5</answer>", "5", ("think_repeated",)),
        ("<think>a</think><answer>a < b</answer>", "a < b", ()),
    ],
)
def test_answers(text: str, answer: str, flaws: tuple[str, ...]) -> None:
    reply = parse_reply(text)
    assert (reply.answer, reply.flaws, reply.call, reply.error) == (answer, flaws, None, None)


@pytest.mark.parametrize("text", [f"<think>a</think>{CALL}", f"<think>a</think>\n{CALL}\n", CALL])
def test_calls(text: str) -> None:
    reply = parse_reply(text)
    assert (reply.call, reply.answer, reply.error) == (RESIZE_CALL, None, None)


@pytest.mark.parametrize(
    ("text", "code", "is_bad_call"),
    [
        ("", "answer_missing", False),
        ("<think></think><answer></answer>", "answer_empty", False),
        ("<answer> \n</answer> and more", "answer_empty", False),
        ("5", "answer_missing", False),
        ("<think>a</think>", "answer_missing", False),
        ("<think>a <answer>5</answer>", "think_unclosed", False),
        ("<answer>5</answer><think>a", "think_unclosed", False),
        ("<think>a</think><answer>5", "answer_unclosed", False),
        ("<think>a</think>5</answer>", "answer_unclosed", False),
        ("<think>a</think></answer>5<answer>", "answer_unclosed", False),
        ("<think>a</think><answer>5</answer><answer>6</answer>", "answers_many", False),
        (f"<think>a</think>{CALL}<answer>5</answer>", "answer_and_call", False),
        (f"<think>a</think>{CALL}{CALL}", "calls_many", True),
        (f"<think>a</think>{CALL} ok", "text_after_call", True),
        (f"<think>a</think>{CALL[:-12]}", "call_unclosed", True),
        ("<think>a</think></tool_call>x<tool_call>", "call_unclosed", True),
        ("<think>a</think><tool_call>{}</tool_call>", "call_missing_key", True),
    ],
)
def test_errors(text: str, code: str, is_bad_call: bool) -> None:
    reply = parse_reply(text)
    assert reply.error is not None
    assert (reply.error.code, reply.is_bad_call) == (code, is_bad_call)
    assert reply.answer is None and reply.call is None


def test_nothing_offered() -> None:
    reply = parse_reply(f"<think>a</think>{CALL}", {})
    assert reply.error is not None and reply.error.code == "tool_not_offered"


CROP_CALL = ToolCall(CROP, View("crop", box=(0, 28, 56, 84)))


@pytest.mark.parametrize("name", shipped_profiles())
def test_taught_forms_are_flawless(name: str) -> None:
    profile = load_profile(name)
    assert parse_reply(profile.reply_answer("a {answer} b", "{think} 5")).answer == "{think} 5"
    assert parse_reply(profile.reply_answer("a", "5")).flaws == ()
    for call in (one for one in (RESIZE_CALL, CROP_CALL) if one.name in profile.offered):
        called = parse_reply(profile.reply_call("a", call), profile.offered)
        assert called.call == call and called.flaws == ()


TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", RESIZE_CALL.to_json(), "x", " "]


@given(st.lists(st.sampled_from(TAGS) | st.text(max_size=4), max_size=12).map("".join))
def test_any_text_says_exactly_one_thing(text: str) -> None:
    reply = parse_reply(text)
    assert sum(x is not None for x in (reply.answer, reply.call, reply.error)) == 1
    assert not reply.is_bad_call or reply.error is not None
