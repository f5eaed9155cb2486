"""The state machine: its table enumerated with real replies, its prompts, budgets and trust."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtengine.protocol.conversation import TRANSITIONS, Conversation, Event, Finish, Limits, Situation, Then
from vtengine.protocol.messages import HIGH, LOW, ErrorInfo, Geometry, Status, Text, View, ViewSize
from vtengine.protocol.profile import Profile, load_profile
from vtengine.protocol.tools import CROP, RESIZE, RESIZE_CALL, ToolCall

ENDING = load_profile("glance")
RETRYING = load_profile("vtengine")
ANSWER = "<think>a</think><answer>5</answer>"
RESIZE_REPLY = RETRYING.reply_call("a", RESIZE_CALL)
BAD_CALL = "<think>a</think><tool_call>{}</tool_call>"

EVENTS: dict[Event, tuple[Profile, str, Finish]] = {
    Event.ANSWER: (ENDING, ANSWER, "stop"),
    Event.GRANT: (ENDING, RESIZE_REPLY, "stop"),
    Event.DENY: (ENDING, RESIZE_REPLY, "stop"),
    Event.RETRY: (RETRYING, BAD_CALL, "stop"),
    Event.MALFORMED: (ENDING, BAD_CALL, "stop"),
    Event.CUT: (ENDING, ANSWER, "length"),
    Event.BROKEN: (ENDING, "", "error"),
}
HEADS = {Then.VIEW: "large:", Then.DENIAL: "no: shown", Then.CORRECTION: "could not be read: name is missing"}


def test_the_table_is_complete() -> None:
    assert set(TRANSITIONS) == {(situation, event) for situation in Situation for event in Event}


@pytest.mark.parametrize(("situation", "event"), TRANSITIONS)
def test_every_transition_happens(situation: Situation, event: Event, geometry: Geometry) -> None:
    profile, text, finish = EVENTS[event]
    conversation = Conversation.start("q", profile, Limits(max_turns=3), geometry)
    if event is Event.DENY:
        conversation = conversation.after(RESIZE_REPLY)  # now the high view is there already
    turns = conversation.turn + (2 if situation is Situation.OPEN else 1)
    after = replace(conversation, limits=Limits(max_turns=turns)).after(text, finish)
    then = TRANSITIONS[situation, event]
    assert after.turn == conversation.turn + 1 and len(after.replies) == after.turn
    if isinstance(then, Then):
        ask = after.ask()
        assert ask is not None and after.status is None and HEADS[then] in ask.text()
        assert (len(ask.views) == 1) == (then is Then.VIEW)
        assert ask.turn == after.turn
    else:
        assert after.status == then and after.ask() is None
        assert (after.answer == "5") == (then == "answered")
        assert (after.error is None) == (then == "answered")


def test_statuses_of_the_contract() -> None:
    reached = {then for then in TRANSITIONS.values() if not isinstance(then, Then)}
    assert reached | {"rejected"} == set(get_args(Status))


@pytest.mark.parametrize(
    ("text", "finish", "code"),
    [
        (BAD_CALL, "stop", "call_missing_key"),
        ("", "stop", "answer_missing"),
        (ANSWER, "length", "reply_too_long"),
        (ANSWER, "error", "generation_error"),
        (ANSWER, "cancelled", "generation_cancelled"),
    ],
)
def test_endings_have_codes(text: str, finish: Finish, code: str) -> None:
    after = Conversation.start("q", ENDING).after(text, finish)
    assert after.error is not None and after.error.code == code


def test_a_call_in_the_last_turn() -> None:
    after = Conversation.start("q", ENDING, Limits(max_turns=1)).after(RESIZE_REPLY)
    assert (after.status, after.error) == ("turn_limit", ErrorInfo("turn_limit", "a call in the last of 1 turns"))
    assert after.views == (LOW,)


@pytest.mark.parametrize(("resolution", "view"), [("low", LOW), ("high", HIGH)])
def test_direct_prompts_offer_no_tool(resolution: str, view: View) -> None:
    start = Conversation.start("q", ENDING, Limits(resolution, max_turns=5))  # type: ignore[arg-type]
    ask = start.ask()
    assert ask is not None and ask.views == (view,) and "resize" not in ask.text()
    after = start.after(RESIZE_REPLY)
    assert after.status == "malformed" and after.error is not None and after.error.code == "tool_not_offered"


def test_many_turns_and_views(geometry: Geometry) -> None:
    conversation = Conversation.start("q", RETRYING, Limits(max_turns=5), geometry)
    calls = [
        ToolCall(CROP, View("crop", box=(0, 0, 10, 10))),
        ToolCall(RESIZE, View("scale", scale=Fraction(3, 4))),
        RESIZE_CALL,
    ]
    for call in calls:
        conversation = conversation.after(RETRYING.reply_call("a", call))
        ask = conversation.ask()
        assert ask is not None and ask.views == (call.view,)
    conversation = conversation.after(BAD_CALL)
    assert "or one <tool_call>" not in conversation.ask().text()  # type: ignore[union-attr]
    conversation = conversation.after(ANSWER)
    assert conversation.status == "answered" and conversation.visual_tokens == 100 + 50 + 225 + 400
    assert conversation.is_upscaled


def test_budget_is_stated_and_enforced(geometry: Geometry) -> None:
    start = Conversation.start("q", RETRYING, Limits(max_turns=3, visual_token_budget=499), geometry)
    assert "It uses 100 of your 499 visual tokens." in start.ask().text()  # type: ignore[union-attr]
    denied = start.after(RESIZE_REPLY)
    text = denied.ask().text()  # type: ignore[union-attr]
    assert "more visual tokens than the budget leaves" in text and "Visual tokens left: 399." in text
    assert denied.views == (LOW,) and denied.replies[-1].error is not None
    assert denied.replies[-1].error.message == "the view has 400 visual tokens, 399 are left"
    crop = denied.after(RETRYING.reply_call("a", ToolCall(CROP, View("crop", box=(0, 0, 9, 9)))))
    assert "Visual tokens left: 349." in crop.ask().text()  # type: ignore[union-attr]
    exact = Conversation.start("q", RETRYING, Limits(visual_token_budget=500), geometry).after(RESIZE_REPLY)
    assert exact.views == (LOW, HIGH)


@pytest.mark.parametrize(("resolution", "budget"), [("adaptive", 99), ("high", 399)])
def test_a_budget_below_the_first_view(resolution: str, budget: int, geometry: Geometry) -> None:
    limits = Limits(resolution, visual_token_budget=budget)  # type: ignore[arg-type]
    start = Conversation.start("q", ENDING, limits, geometry)
    assert start.status == "rejected" and start.ask() is None
    assert start.error is not None and start.error.code == "visual_budget_too_small"


def test_a_box_outside(geometry: Geometry) -> None:
    call = ToolCall(CROP, View("crop", box=(300, 0, 310, 10)))
    after = Conversation.start("q", RETRYING, Limits(), geometry).after(RETRYING.reply_call("a", call))
    assert "the box is not inside the first view" in after.ask().text()  # type: ignore[union-attr]


def test_sizes_need_a_geometry() -> None:
    with pytest.raises(ValueError, match="give the image's geometry"):
        Conversation.start("q", RETRYING)
    with pytest.raises(ValueError, match="needs the image's geometry"):
        Conversation.start("q", ENDING, Limits(visual_token_budget=5))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"resolution": "mid"}, "limits.resolution = 'mid': must be one of adaptive, low, high"),
        ({"max_turns": 0}, "limits.max_turns = 0: must be >= 1"),
        ({"visual_token_budget": 0}, "limits.visual_token_budget = 0"),
        ({"max_context_tokens": -1}, "limits.max_context_tokens = -1"),
    ],
)
def test_limits_are_checked(limits: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**limits)  # type: ignore[arg-type]


@given(st.text())
def test_the_question_is_never_trusted(question: str) -> None:
    for limits in (Limits(), Limits("low"), Limits("high")):
        ask = Conversation.start(question, ENDING, limits).ask()
        assert ask is not None
        untrusted = [part.text for part in ask.parts if isinstance(part, Text) and not part.trusted]
        assert "".join(untrusted) == question
        trusted = "".join(part.text for part in ask.parts if isinstance(part, Text) and part.trusted)
        plain = Conversation.start("", ENDING, limits).ask()
        assert plain is not None and trusted == plain.text(image="")


def test_text_of_the_model_is_never_trusted(geometry: Geometry) -> None:
    reply = '<think>a</think><tool_call>{"name": "<|im_end|>", "arguments": {}}</tool_call>'
    ask = Conversation.start("q", RETRYING, Limits(), geometry).after(reply).ask()
    assert ask is not None and "<|im_end|>'" in ask.text()
    for part in ask.parts:
        if isinstance(part, Text) and part.trusted:
            assert "<|im_end|>'" not in part.text


def test_it_is_pure(geometry: Geometry) -> None:
    start = Conversation.start("q", RETRYING, Limits(max_turns=3), geometry)
    before = replace(start)
    assert start.after(RESIZE_REPLY) == start.after(RESIZE_REPLY)
    assert start == before and start.ask() == start.ask()


TEXTS = st.lists(
    st.sampled_from([ANSWER, RESIZE_REPLY, BAD_CALL, "<think>", "</think>", "<answer>", "x"]), max_size=3
).map("".join)
FINISHES: st.SearchStrategy[Finish] = st.sampled_from(["stop", "stop", "stop", "length", "cancelled", "error"])


class Flat:
    def size(self, view: View) -> ViewSize:
        return ViewSize(28, 28 * len(view.kind))


@given(
    st.lists(st.tuples(TEXTS, FINISHES), min_size=8, max_size=8),
    st.integers(1, 6),
    st.none() | st.integers(1, 20),
    st.sampled_from([ENDING, RETRYING]),
)
def test_any_play_ends_within_the_limits(
    replies: list[tuple[str, Finish]], max_turns: int, budget: int | None, profile: Profile
) -> None:
    conversation = Conversation.start("q", profile, Limits(max_turns=max_turns, visual_token_budget=budget), Flat())
    for text, finish in replies:
        assert (conversation.pending is None) == (conversation.status is not None)
        if conversation.ask() is None:
            break
        conversation = conversation.after(text, finish)
    assert conversation.status in get_args(Status) and conversation.turn <= max_turns
    assert (conversation.answer is not None) == (conversation.status == "answered")
    assert (conversation.error is None) == (conversation.status == "answered")
    if budget is not None and conversation.status != "rejected":
        assert conversation.visual_tokens <= budget
    assert len(set(conversation.views)) == len(conversation.views)


def test_every_code_is_documented() -> None:
    """docs/protocol.md names each code that protocol and rollout can give."""
    root = Path(__file__).parents[2]
    sources = [*(root / "vtengine" / "protocol").glob("*.py"), *(root / "vtengine" / "rollout").glob("*.py")]
    pattern = re.compile(r'(?:ErrorInfo|CallError)\(\s*"([a-z_]+)"')
    codes = {code for path in sources for code in pattern.findall(path.read_text(encoding="utf-8"))}
    assert len(codes) > 20
    documented = (root / "docs" / "protocol.md").read_text(encoding="utf-8")
    assert not {code for code in codes if f"`{code}`" not in documented}
