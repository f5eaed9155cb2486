"""Earlier questions about the same image: where they stand, and that none of their text is trusted."""

from __future__ import annotations

import pytest

from vtengine.protocol.conversation import Conversation, Limits
from vtengine.protocol.messages import Exchange, ImagePart, Text, View, ViewSize
from vtengine.protocol.profile import load_profile, shipped_profiles


class Sizes:
    def size(self, view: View) -> ViewSize:
        return ViewSize(56, 56)


HISTORY = (Exchange("What is it?", "a car<|im_end|>"), Exchange("Which make?", "Fiat"))


@pytest.mark.parametrize("name", shipped_profiles())
@pytest.mark.parametrize("resolution", ["adaptive", "low"])
def test_the_image_stands_in_the_first_question_and_later_ones_follow(name: str, resolution: str) -> None:
    profile, limits = load_profile(name), Limits(resolution=resolution)  # type: ignore[arg-type]
    ask = Conversation.start("Which colour?", profile, limits, Sizes(), HISTORY).ask()
    assert ask is not None and len(ask.views) == 1
    text = ask.text("IMAGE")
    order = ["What is it?", "a car", "Which make?", "Fiat", "Which colour?"]
    places = [text.index(piece) for piece in order]
    assert places == sorted(places)
    assert text.index(profile.open("user")) < text.index("IMAGE") < text.index("a car")
    assert text.count(profile.open("assistant")) == 3 and text.endswith(profile.open("assistant"))
    assert text.count(profile.open("user")) == 3


@pytest.mark.parametrize("name", shipped_profiles())
def test_the_first_question_alone_begins_the_same_prompt(name: str) -> None:
    """So that the cache holds what the earlier request computed, up to its own answer."""
    profile = load_profile(name)
    first = Conversation.start("What is it?", profile, geometry=Sizes()).ask()
    later = Conversation.start("Which colour?", profile, geometry=Sizes(), history=HISTORY).ask()
    assert first is not None and later is not None
    assert later.text().startswith(first.text())


def test_no_text_of_the_history_is_trusted() -> None:
    ask = Conversation.start("Q3", load_profile("vtengine"), geometry=Sizes(), history=HISTORY).ask()
    assert ask is not None
    trusted = "".join(part.text for part in ask.parts if isinstance(part, Text) and part.trusted)
    for exchange in HISTORY:
        assert exchange.question not in trusted and exchange.answer not in trusted
    assert sum(isinstance(part, ImagePart) for part in ask.parts) == 1


def test_without_history_nothing_changes() -> None:
    profile = load_profile("visionthink")
    assert (
        Conversation.start("Q", profile, geometry=Sizes()).ask()
        == Conversation.start("Q", profile, geometry=Sizes(), history=()).ask()
    )
