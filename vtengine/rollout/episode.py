"""THE loop: ask -> render -> generate -> commit -> next. Server, training and evaluation all call `run_episode`."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vtengine.engine.base import (
    Backend,
    BackendFailed,
    Completion,
    ImageInput,
    Request,
    RequestRejected,
    SamplingParams,
)
from vtengine.protocol.conversation import Conversation, Limits
from vtengine.protocol.messages import Ask, ErrorInfo, Status, View
from vtengine.protocol.profile import Profile
from vtengine.protocol.reply import Reply
from vtengine.rollout.question import ImageGeometry, Question
from vtengine.rollout.tokenizer import StreamDecoder, Tokenizer
from vtengine.rollout.transcript import BadCompletion, ContextFull, Transcript
from vtengine.vision.errors import ImageError
from vtengine.vision.pipeline import SourceImage
from vtengine.vision.plan import ViewPlan

log = logging.getLogger(__name__)
_episodes = itertools.count()  # makes request ids differ between samples of one question
ATTEMPTS = 2
"""Times a request is sent when the backend breaks before its first token."""


class Views(Protocol):
    """The part of the image pipeline that an episode uses."""

    async def open(self, source: str, root: Path, /) -> SourceImage: ...

    async def view(self, image: SourceImage, plan: ViewPlan, /) -> ImageInput: ...


@dataclass(frozen=True)
class ShownImage:
    """A view as the model got it, in pixels. `encoded`: the vision tower ran for it because of this turn."""

    width: int
    height: int
    visual_tokens: int
    encoded: bool


@dataclass(frozen=True)
class Turn:
    """One request and its reply. `action`: what the reply called for.

    images: the views new in this turn, as shown; views: the same, as the protocol names them.
    reencoded_images: views of earlier turns that the vision tower had to run for again (their features were evicted).
    """

    text: str
    completion: Completion
    reply: Reply
    images: tuple[ShownImage, ...]
    reencoded_images: int = 0
    views: tuple[View, ...] = ()

    @property
    def action(self) -> str | None:
        return None if self.reply.call is None else self.reply.call.action


@dataclass(frozen=True)
class Episode:
    """How a question went. `image` is None where the question has none, or it could not be opened (then there are no
    turns).

    more_images: the others of the question, as far as they could be opened.
    """

    question: Question
    status: Status
    answer: str | None
    error: ErrorInfo | None
    turns: tuple[Turn, ...]
    transcript: Transcript = field(repr=False)
    latency_s: float
    image: SourceImage | None = field(default=None, repr=False)
    more_images: tuple[SourceImage, ...] = field(default=(), repr=False)

    @property
    def images(self) -> tuple[ShownImage, ...]:
        """Every view that the model replied to, in order."""
        return tuple(image for turn in self.turns for image in turn.images)

    @property
    def is_upscaled(self) -> bool:
        """The model was shown a closer view, and replied."""
        return any(turn.images for turn in self.turns[1:])

    @property
    def visual_tokens(self) -> int:
        return sum(image.visual_tokens for image in self.images)

    @property
    def setup_fault(self) -> str | None:
        """What is wrong with settings or server, where they are to blame for a rejection: others end like this one."""
        if self.error is None or self.status != "rejected" or self.error.blame != "setup":
            return None
        return f"{self.error.code}: {self.error.message}"

    @property
    def visual_tokens_full(self) -> int:
        """What showing the high view of every image at once costs."""
        opened = () if self.image is None else (self.image, *self.more_images)
        return sum(image.high.visual_tokens for image in opened)


@dataclass(frozen=True)
class Asked:
    """A request is about to be sent; `prompt_tokens` counts the whole context."""

    turn: int
    images: tuple[ImageInput, ...]
    prompt_tokens: int
    views: tuple[View, ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """New text of the reply; the pieces of a turn, joined, are its text."""

    turn: int
    text: str


@dataclass(frozen=True)
class Replied:
    turn: int
    record: Turn


Event = Asked | TextDelta | Replied
OnEvent = Callable[[Event], None]


async def run_episode(
    question: Question,
    backend: Backend,
    pipeline: Views,
    tokenizer: Tokenizer,
    profile: Profile,
    limits: Limits,
    sampling: SamplingParams,
    on_event: OnEvent | None = None,
) -> Episode:
    """Runs one question to its end. With `on_event` the reply is streamed.

    Every fault of input, backend or model is a status of the episode; only cancellation raises.
    """
    run = _Run(question, backend, pipeline, tokenizer, limits, sampling, on_event)
    conversation = await run.start(profile)
    while (ask := conversation.ask()) is not None:
        try:
            request = await run.render(ask)
            completion = await run.generate(request, ask.turn)
            text = run.transcript.commit(completion)
        except Exception as fault:
            conversation = conversation.failed(*_describe(fault, ask.turn))
            break
        conversation = conversation.after(text, completion.finish)
        run.record(text, completion, conversation.replies[-1], ask.views)
    return run.close(conversation)


class _Run:
    """The mutable side of one episode: images, transcript, turns and clock."""

    def __init__(
        self,
        question: Question,
        backend: Backend,
        pipeline: Views,
        tokenizer: Tokenizer,
        limits: Limits,
        sampling: SamplingParams,
        on_event: OnEvent | None,
    ) -> None:
        self.question, self.backend, self.pipeline, self.tokenizer = question, backend, pipeline, tokenizer
        self.limits, self.sampling, self.on_event = limits, sampling, on_event
        self.transcript = Transcript(tokenizer, limits.max_context_tokens)
        self.name = f"{question.id}#{next(_episodes)}"
        self.turns: list[Turn] = []
        self.images: list[SourceImage] = []
        self.started_s = time.perf_counter()

    async def start(self, profile: Profile) -> Conversation:
        try:
            self.question.text.encode("utf-8")
            await self._open_images()
            geometry, question = ImageGeometry(tuple(self.images)), self.question
            places = question.places or (0,) * len(self.images)
            return Conversation.start(question.text, profile, self.limits, geometry, question.history, places)
        except Exception as fault:
            ended = Conversation(self.question.text, profile, self.limits)
            return ended.failed(*_describe(fault, 0))

    async def _open_images(self) -> None:
        """All at once; of several that cannot be opened, the first is told of."""
        opening = (self.pipeline.open(image, self.question.root) for image in self.question.images)
        for opened in await asyncio.gather(*opening, return_exceptions=True):
            if isinstance(opened, BaseException):
                raise opened
            self.images.append(opened)

    async def render(self, ask: Ask) -> Request:
        geometry = ImageGeometry(tuple(self.images))
        images = [await self.pipeline.view(self.images[view.image], geometry.plan(view)) for view in ask.views]
        self.transcript.append_ask(ask, images)
        self.emit(Asked(ask.turn, tuple(images), len(self.transcript), ask.views))
        return self.transcript.request(f"{self.name}/{ask.turn}", ask.turn, self.sampling, self.started_s)

    async def generate(self, request: Request, turn: int) -> Completion:
        """One completion; a backend that breaks before its first token is asked again."""
        for attempt in range(1, ATTEMPTS + 1):
            reader = None if self.on_event is None else _Reader(self, turn)
            try:
                completion = await self.backend.generate(request, reader)
            except BackendFailed:
                if attempt == ATTEMPTS or (reader is not None and reader.begun):
                    raise
            else:
                if reader is not None:
                    reader.end()
                return completion
        raise AssertionError("unreachable")

    def record(self, text: str, completion: Completion, reply: Reply, views: tuple[View, ...]) -> None:
        spans, encoded = self.transcript.images, completion.images_encoded
        split = len(spans) - len(views)
        shown = tuple(
            ShownImage(span.image.width, span.image.height, span.image.visual_tokens, ran)
            for span, ran in zip(spans[split:], encoded[split:], strict=True)
        )
        turn = Turn(text, completion, reply, shown, sum(encoded[:split]), views)
        self.turns.append(turn)
        self.emit(Replied(len(self.turns) - 1, turn))

    def close(self, conversation: Conversation) -> Episode:
        assert conversation.status is not None
        return Episode(
            question=self.question,
            status=conversation.status,
            answer=conversation.answer,
            error=conversation.error,
            turns=tuple(self.turns),
            transcript=self.transcript,
            latency_s=time.perf_counter() - self.started_s,
            image=self.images[0] if self.images else None,
            more_images=tuple(self.images[1:]),
        )

    def emit(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)


class _Reader:
    """Makes text of a reply's ids as they come."""

    def __init__(self, run: _Run, turn: int) -> None:
        self._run, self._turn = run, turn
        self._decoder = StreamDecoder(run.tokenizer)
        self.begun = False

    def __call__(self, token_ids: Sequence[int]) -> None:
        self.begun = True
        self._emit(self._decoder.push(self._run.transcript.without_stop(token_ids)))

    def end(self) -> None:
        self._emit(self._decoder.flush())

    def _emit(self, text: str) -> None:
        if text:
            self._run.emit(TextDelta(self._turn, text))


def _describe(fault: Exception, turn: int) -> tuple[ErrorInfo, Status]:
    """A fault as error and status. What nobody foresaw is logged with its traceback."""
    if isinstance(fault, RequestRejected):
        return ErrorInfo(fault.code, str(fault), fault.blame), "rejected"
    if isinstance(fault, ImageError):
        return ErrorInfo(fault.code, str(fault)), "failed" if fault.code == "image_unreachable" else "rejected"
    if isinstance(fault, ContextFull):
        if turn == 0:
            return ErrorInfo("prompt_too_long", str(fault)), "rejected"
        return ErrorInfo("context_full", str(fault)), "truncated"
    if isinstance(fault, BackendFailed):
        return ErrorInfo("backend_failed", str(fault)), "failed"
    if isinstance(fault, BadCompletion):
        return ErrorInfo("completion_invalid", str(fault)), "failed"
    if isinstance(fault, UnicodeEncodeError):
        return ErrorInfo("text_not_unicode", f"the question is no Unicode text: {fault.reason}"), "rejected"
    log.error("unforeseen fault in an episode", exc_info=fault)
    return ErrorInfo("internal_error", f"{type(fault).__name__}: {fault}"), "failed"
