"""Several images: where they stand, which of them a call is about, one budget for all; one image stays as it was."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtengine.protocol.conversation import Conversation, Limits
from vtengine.protocol.messages import HIGH, LOW, Exchange, ImagePart, Text, View, ViewSize
from vtengine.protocol.profile import Profile, load_profile, shipped_profiles
from vtengine.protocol.tools import CROP, RESIZE, RESIZE_CALL, ToolCall

PROFILE = load_profile("vtengine")


class Sizes:
    """Image i is 10 * (i + 1) visual tokens low, four times that high."""

    def size(self, view: View) -> ViewSize:
        sides = {"low": 28, "high": 56, "scale": 28 + 14 * (view.image % 2), "crop": 28}
        return ViewSize(10 * (view.image + 1) * sides[view.kind] // 28 * 28, sides[view.kind] // 28 * 28)


def start(count: int = 2, limits: Limits | None = None, profile: Profile = PROFILE) -> Conversation:
    return Conversation.start("Which?", profile, limits or Limits(max_turns=4), Sizes(), places=(0,) * count)


def call(name: str = RESIZE, image: int | None = None, **view: object) -> str:
    shown = View("crop", box=(0, 0, 9, 9)) if name == CROP else replace(HIGH, **view)  # type: ignore[arg-type]
    return PROFILE.reply_call("", ToolCall(name, shown, image))


def views_of(conversation: Conversation) -> list[tuple[str, int]]:
    ask = conversation.ask()
    assert ask is not None
    return [(view.kind, view.image) for view in ask.views]


@pytest.mark.parametrize("name", shipped_profiles())
@pytest.mark.parametrize("resolution", ["adaptive", "low", "high"])
def test_images_stand_where_they_were_sent(name: str, resolution: str) -> None:
    history = (Exchange("First?", "Uno"), Exchange("Second?", "Due"))
    profile, limits = load_profile(name), Limits(resolution)  # type: ignore[arg-type]
    ask = Conversation.start("Third?", profile, limits, Sizes(), history, (0, 0, 2)).ask()
    assert ask is not None and [view.image for view in ask.views] == [0, 1, 2]
    assert {view.kind for view in ask.views} == {"high" if resolution == "high" else "low"}
    users = ask.text("IMAGE").split(profile.open("user"))[1:]
    assert [text.count("IMAGE") for text in users] == [2, 0, 1]
    assert [question in text for question, text in zip(("First?", "Second?", "Third?"), users, strict=True)] == [
        True
    ] * 3
    trusted = "".join(part.text for part in ask.parts if isinstance(part, Text) and part.trusted)
    assert not any(text in trusted for text in ("First?", "Uno", "Second?", "Due", "Third?"))


def test_images_are_numbered_and_sized() -> None:
    ask = start(2).ask()
    assert ask is not None
    text = ask.text("*")
    assert "Picture 1, 280 x 28 pixels:\n<|vision_start|>*<|vision_end|>\nPicture 2, 560 x 28 pixels:\n" in text
    assert '"image": {"type": "integer"' in text


def test_a_call_without_a_number_is_about_all() -> None:
    after = start(3).after(call())
    assert views_of(after) == [("high", 0), ("high", 1), ("high", 2)]
    assert after.is_upscaled and "Picture 3, 1680 x 56 pixels" in after.ask().text()  # type: ignore[union-attr]


def test_a_call_with_a_number_is_about_one_and_the_rest_may_follow() -> None:
    one = start(3).after(call(image=2))
    assert views_of(one) == [("high", 1)]
    again = one.after(call(image=2))
    assert again.replies[-1].error is not None and again.replies[-1].error.code == "already_shown"
    assert views_of(again) == []
    assert views_of(one.after(call())) == [("high", 0), ("high", 2)], "what was shown is not shown again"


@pytest.mark.parametrize(
    ("reply", "code"),
    [(call(image=3), "argument_value"), (call(CROP), "argument_missing"), (call(CROP, image=9), "argument_value")],
)
def test_calls_about_no_image_are_bad_calls(reply: str, code: str) -> None:
    after = start(2).after(reply)
    error = after.replies[-1].error
    assert error is not None and error.code == code and after.replies[-1].is_bad_call and views_of(after) == []
    assert "could not be read" in after.ask().text()  # type: ignore[union-attr]


def test_a_crop_names_its_image() -> None:
    ask = start(2).after(call(CROP, image=2)).ask()
    assert ask is not None and ask.views == (View("crop", box=(0, 0, 9, 9), image=1),)


def test_the_number_is_not_offered_for_one_image() -> None:
    after = start(1).after(call(image=1))
    assert after.replies[-1].error is not None and after.replies[-1].error.code == "argument_unknown"


def test_one_budget_for_all() -> None:
    limits = Limits(max_turns=4, visual_token_budget=30 + 40)
    after = start(2, limits).after(call())
    assert after.replies[-1].error is not None and after.replies[-1].error.code == "budget"
    assert views_of(after.after(call(image=1))) == [("high", 0)], "one of them fits"
    rejected = start(2, Limits(visual_token_budget=29))
    assert rejected.status == "rejected" and rejected.error is not None
    assert rejected.error.message == "the first 2 views have 30 visual tokens, the budget is 29"


def test_a_profile_without_words_for_it() -> None:
    strings = {key: text for key, text in PROFILE.strings.items() if not key.startswith("several.")}
    bare = replace(PROFILE, strings=strings)
    assert start(1, profile=bare).status is None
    refused = start(2, profile=bare)
    assert refused.status == "rejected" and refused.error is not None and refused.error.code == "images_unsupported"


def test_an_image_with_a_later_question_is_numbered_too() -> None:
    history = (Exchange("Hello", "Hi"),)
    ask = Conversation.start("And this?", PROFILE, None, Sizes(), history, (1,)).ask()
    assert ask is not None and "Picture 1" in ask.text() and len(ask.views) == 1
    parts = [part for part in ask.parts if isinstance(part, ImagePart) or "Hello" in part.text]
    assert isinstance(parts[0], Text) and isinstance(parts[1], ImagePart)


SHARE = Fraction(3, 4)


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        (HIGH, View("scale", SHARE)),
        (View("scale", Fraction(9, 10)), View("scale", SHARE)),
        (View("scale", Fraction(6, 10)), View("scale", Fraction(6, 10))),
        (LOW, LOW),
        (View("crop", box=(0, 0, 9, 9), image=1), View("crop", box=(0, 0, 9, 9), image=1)),
        (View("high", image=2), View("scale", SHARE, image=2)),
    ],
)
def test_scale_bounds_views_of_whole_images(asked: View, shown: View) -> None:
    assert Limits(scale=0.75).capped(asked) == shown
    assert Limits().capped(asked) == Limits(scale=1.0).capped(asked) == asked


def test_scale_stands_for_the_high_view() -> None:
    high = Conversation.start("?", PROFILE, Limits("high", scale=0.75), Sizes())
    assert high.views == (View("scale", SHARE),)
    asked = Conversation.start("?", PROFILE, Limits(max_turns=3, scale=0.75), Sizes()).after(
        PROFILE.reply_call("", RESIZE_CALL)
    )
    assert asked.views == (LOW, View("scale", SHARE))
    again = asked.after(PROFILE.reply_call("", RESIZE_CALL))
    assert again.replies[-1].error is not None and again.replies[-1].error.code == "already_shown"


@pytest.mark.parametrize("scale", [0.5, 0.0, 1.01, -1.0, float("nan")])
def test_scales_that_are_none(scale: float) -> None:
    with pytest.raises(ValueError, match=r"limits.scale = .*: must be above 0.5 and at most 1"):
        Limits(scale=scale)


REPLIES = [
    call(),
    call(image=1),
    call(image=2),
    call(image=7),
    call(CROP, image=1),
    call(CROP),
    "<answer>x</answer>",
    "",
]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 3), st.lists(st.sampled_from(REPLIES), max_size=6), st.integers(60, 400))
def test_no_view_twice_and_never_over_the_budget(count: int, replies: list[str], budget: int) -> None:
    conversation = start(count, Limits(max_turns=5, visual_token_budget=budget))
    for reply in replies:
        if conversation.status is not None:
            break
        ask = conversation.ask()
        assert ask is not None and set(ask.views) <= set(conversation.views)
        conversation = conversation.after(reply)
        assert len(set(conversation.views)) == len(conversation.views)
        assert conversation.visual_tokens <= budget
        assert all(0 <= view.image < count for view in conversation.views)
