"""Episodes from replies, through the real conversation; no engine, no pixels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from vtengine_training.data.examples import Example

from vtengine.engine.base import Completion
from vtengine.protocol.conversation import Conversation, Limits
from vtengine.protocol.profile import load_profile
from vtengine.rollout.episode import Episode, ShownImage, Turn
from vtengine.rollout.question import Question

CALL = '<tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
LOW, HIGH = ShownImage(56, 56, 4, True), ShownImage(112, 112, 16, True)


def episode(*replies: str, finish: str = "stop", max_turns: int = 2) -> Episode:
    """What becomes of these replies; `finish` is that of the last one."""
    talk = Conversation.start("?", load_profile("glance"), Limits(max_turns=max_turns))
    turns = []
    for place, text in enumerate(replies):
        ended = finish if place == len(replies) - 1 else "stop"
        images = (LOW,) if place == 0 else (HIGH,) if len(talk.views) > len(turns_views(turns)) else ()
        talk = talk.after(text, ended)
        completion = Completion("r", (1,), (-0.1,), ended, 8, 0, (True,), 0, 0.0, 0.0)
        turns.append(Turn(text, completion, talk.replies[-1], images))
    if talk.status is None:
        raise AssertionError("the replies do not end the episode")
    image = SimpleNamespace(high=SimpleNamespace(visual_tokens=16))
    return Episode(Question(1, "x.png", "?"), talk.status, talk.answer, talk.error, tuple(turns), None, 0.0, image)


def turns_views(turns: list[Turn]) -> list[ShownImage]:
    return [image for turn in turns for image in turn.images]


def direct(answer: str) -> Episode:
    return episode(f"<think>t</think><answer>{answer}</answer>")


def upscaled(answer: str) -> Episode:
    return episode(f"<think>t</think>{CALL}", f"<think>t</think><answer>{answer}</answer>")


def example(*answers: str, question: str = "How many chairs are there?", **fields: object) -> Example:
    return Example("e1", "x.png", question, answers, Path("."), fields)
