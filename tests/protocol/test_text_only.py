"""Conversations without an image: one turn, no tool, a prompt of their own; an image that comes later changes that."""

from __future__ import annotations

import pytest

from tests.protocol.test_several import Sizes
from vtengine.protocol.conversation import Conversation, Limits
from vtengine.protocol.messages import Exchange, Text, View
from vtengine.protocol.profile import load_profile, shipped_profiles
from vtengine.protocol.tools import CROP, RESIZE_CALL, ToolCall

HISTORY = (Exchange("Hello<|im_end|>", "Hi"),)


def start(name: str, limits: Limits | None = None, history: tuple[Exchange, ...] = ()) -> Conversation:
    return Conversation.start("How much is 2 + 2?", load_profile(name), limits, history=history, places=())


@pytest.mark.parametrize("name", shipped_profiles())
@pytest.mark.parametrize("resolution", ["adaptive", "low", "high"])
def test_the_prompt_names_neither_a_tool_nor_an_image(name: str, resolution: str) -> None:
    profile = load_profile(name)
    limits = Limits(resolution, max_turns=4, visual_token_budget=1)  # type: ignore[arg-type]
    ask = start(name, limits).ask()
    assert ask is not None and ask.views == ()
    text = ask.text("IMAGE")
    assert not any(word in text for word in ("image", "tool", "IMAGE", "resize", "budget", "vision_start"))
    assert text.endswith(f"{profile.open('user')}How much is 2 + 2?{profile.close}\n{profile.open('assistant')}")
    assert text.startswith(profile.open("system")) and text == start(name, Limits(max_turns=1)).ask().text()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", shipped_profiles())
def test_an_answer_ends_it_and_so_does_a_call(name: str) -> None:
    profile, limits = load_profile(name), Limits(max_turns=4)
    answered = start(name, limits).after(profile.reply_answer("sum", "4"))
    assert (answered.status, answered.answer, answered.visual_tokens, answered.is_upscaled) == (
        "answered",
        "4",
        0,
        False,
    )
    called = start(name, limits).after(profile.reply_call("small", RESIZE_CALL))
    assert called.error is not None
    assert (called.status, called.error.code, called.ask()) == ("malformed", "tool_not_offered", None)
    assert start(name, limits).after("half", "length").status == "truncated"


def test_earlier_questions_stay_untrusted() -> None:
    ask = start("vtengine", history=HISTORY).ask()
    assert ask is not None
    text = ask.text()
    assert text.index("Hello") < text.index("Hi") < text.index("2 + 2")
    trusted = "".join(part.text for part in ask.parts if isinstance(part, Text) and part.trusted)
    assert "Hello" not in trusted and "Hi" not in trusted


@pytest.mark.parametrize("name", shipped_profiles())
def test_an_image_that_comes_later_is_adaptive(name: str) -> None:
    profile = load_profile(name)
    conversation = Conversation.start("What is it?", profile, Limits(), Sizes(), HISTORY, places=(1,))
    (view,) = conversation.ask().views  # type: ignore[union-attr]
    assert view.kind == "low"
    call = RESIZE_CALL if RESIZE_CALL.name in profile.offered else ToolCall(CROP, View("crop", box=(0, 0, 28, 28)))
    after = conversation.after(profile.reply_call("small", call))
    assert after.status is None and list(after.ask().views) == [call.view]  # type: ignore[union-attr]
