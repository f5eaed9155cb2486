"""Teaching episodes: what prompt, which views, which reply, and how much each reply token counts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from vtengine.protocol.conversation import Conversation, Limits
from vtengine.protocol.messages import Ask, ImagePart
from vtengine.protocol.profile import Profile
from vtengine.protocol.tools import RESIZE_CALL
from vtengine_training.sft.tokenizer import THINK_FIRST, THINK_LARGE, token_ids

Mode = Literal["low", "high", "answer", "call"]
"""low, high: the direct prompts. answer: adaptive, answered at once. call: adaptive, the high view, then answered."""
ViewName = Literal["low", "high"]


@dataclass(frozen=True)
class Turn:
    """Token pieces of one prompt (an int list, or a view's name where its visual tokens go), then the reply."""

    prompt: tuple[tuple[int, ...] | ViewName, ...]
    reply: tuple[int, ...]
    weights: tuple[float, ...]
    answer: tuple[int, int] = (0, 0)
    """Where the answer stands in the reply: first token, and the one behind the last."""


class Renderer:
    """Renders episodes through the same conversation state machine as inference. Texts are tokenised once."""

    def __init__(self, tokenizer: Tokenizer, profile: Profile) -> None:
        self.profile = profile
        self.stop = token_ids(tokenizer)["<|im_end|>"]
        self.encode = functools.cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids))

    def ask(self, ask: Ask) -> tuple[tuple[int, ...] | ViewName, ...]:
        """The prompt's token pieces; a view's name stands for its visual tokens."""
        pieces: list[tuple[int, ...] | ViewName] = []
        for part in ask.parts:
            if isinstance(part, ImagePart):
                pieces.append("low" if part.view.kind == "low" else "high")
            else:
                pieces.append(self.encode(part.text))
        return tuple(pieces)

    def answering(self, ask: Ask, think: str, answer: str, weight: float) -> Turn:
        """A turn that answers, with its closing mark; the tokens of the answer itself count `weight`."""
        before, after = self.profile.reply_answer(think, "\0").split("\0")
        ids = (*self.encode(before + answer + after), self.stop)
        head, tail = len(self.encode(before)), len(self.encode(after)) + 1
        weights = (1.0,) * head + (weight,) * (len(ids) - head - tail) + (1.0,) * tail
        return Turn(self.ask(ask), ids, weights, (head, len(ids) - tail))

    def episode(self, question: str, answer: str, mode: Mode, answer_weight: float = 1.0) -> tuple[Turn, ...]:
        """All turns of one episode; the answer's own tokens count `answer_weight` (a random guess counts little)."""
        resolution = mode if mode in ("low", "high") else "adaptive"
        start = Conversation.start(question, self.profile, Limits(resolution=resolution))  # type: ignore[arg-type]
        first = start.ask()
        assert first is not None
        if mode != "call":
            return (self.answering(first, THINK_FIRST, answer, answer_weight),)
        text = self.profile.reply_call(THINK_FIRST, RESIZE_CALL)
        call = (*self.encode(text), self.stop)
        second = start.after(text).ask()
        assert second is not None, "the profile must grant its own resize call"
        return (
            Turn(self.ask(first), call, (1.0,) * len(call)),
            self.answering(second, THINK_LARGE, answer, answer_weight),
        )


@dataclass
class Sequence:
    """One packed training sequence. `views` are the views shown, in order; `starts` where each begins in `ids`."""

    ids: list[int]
    weights: list[float]
    """Per token: what predicting this token counts; 0 for everything the model does not say."""
    views: list[ViewName]
    starts: list[int]
    answer: tuple[int, int] = (0, 0)


def assemble(turns: tuple[Turn, ...], visual_tokens: dict[ViewName, int], image_token: int) -> Sequence:
    """Token ids with one image token per visual token, and the loss weights."""
    sequence = Sequence([], [], [], [])
    for turn in turns:
        for piece in turn.prompt:
            ids = piece
            if isinstance(piece, str):
                sequence.views.append(piece)
                sequence.starts.append(len(sequence.ids))
                ids = (image_token,) * visual_tokens[piece]
            sequence.ids.extend(ids)  # type: ignore[arg-type]
        sequence.weights.extend([0.0] * (len(sequence.ids) - len(sequence.weights)))
        begin = len(sequence.ids)
        sequence.answer = (begin + turn.answer[0], begin + turn.answer[1])
        sequence.ids.extend(turn.reply)
        sequence.weights.extend(turn.weights)
    return sequence


def pick_mode(rng: np.random.Generator, shares: dict[str, float], call_share: float) -> Mode:
    """`shares` of the direct prompts low and high; the rest is adaptive, and asks for the high view in `call_share`."""
    draw = rng.random()
    if draw < shares["low"]:
        return "low"
    if draw < shares["low"] + shares["high"]:
        return "high"
    return "call" if rng.random() < call_share else "answer"
