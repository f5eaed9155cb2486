"""From an OpenAI request to what the episode loop takes: question, images, history, limits, sampling."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vtengine.engine.base import SamplingParams
from vtengine.protocol.conversation import Limits
from vtengine.protocol.messages import Exchange, Resolution
from vtengine.rollout.group import Setting
from vtengine.rollout.question import Question
from vtengine.server.config import ServerLimits
from vtengine.server.errors import invalid
from vtengine.server.schema import AssistantMessage, ChatRequest, Extension, ImagePart, SystemMessage, UserMessage

_SCHEMES = ("data:", "http://", "https://")


@dataclass(frozen=True)
class Job:
    """limits, sampling: the server's with what the request states. max_tokens: of all turns together, for each choice.
    stops: cut the answer. image_params: the field that holds each image of the question.
    """

    limits: Limits
    sampling: SamplingParams
    question: Question
    image_params: tuple[str, ...]
    num_choices: int
    max_tokens: int | None
    stops: tuple[str, ...]
    streams: bool
    with_logprobs: bool
    with_usage: bool


@dataclass
class _Images:
    """The images of a request as they are found: each one once, with the field and the question it stands with."""

    urls: list[str] = field(default_factory=list)
    params: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    details: set[str | None] = field(default_factory=set)
    num_parts: int = 0


def prepare(chat: ChatRequest, setting: Setting, limits: ServerLimits, request_id: str) -> Job:
    """Raises ApiError 400 naming the field that the protocol has no place for."""
    images, exchanges, question = _read_messages(chat, limits)
    most = min(limits.max_choices, limits.max_running + limits.max_waiting)
    if chat.n is not None and chat.n > most:
        raise invalid("n", f"must be at most {most} here", value=chat.n)
    names = ("temperature", "top_p", "top_k", "seed")
    stated = {name: value for name in names if (value := getattr(chat, name)) is not None}
    sampling = replace(setting.sampling, **stated) if stated else setting.sampling
    asked = [value for value in (chat.max_tokens, chat.max_completion_tokens) if value is not None]
    return Job(
        limits=_limits(chat, setting.limits, images.details),
        sampling=sampling,
        question=Question(
            request_id,
            images.urls[0] if images.urls else None,
            question,
            history=tuple(exchanges),
            more_images=tuple(images.urls[1:]),
            places=tuple(images.places),
        ),
        image_params=tuple(images.params),
        num_choices=chat.n or 1,
        max_tokens=min(asked, default=None),
        stops=tuple(chat.stop or ()),
        streams=bool(chat.stream),
        with_logprobs=bool(chat.logprobs),
        with_usage=bool(chat.stream_options and chat.stream_options.include_usage),
    )


def _limits(chat: ChatRequest, base: Limits, details: set[str | None]) -> Limits:
    """The server's own limits, tightened by the request's; the resolution is free to choose.

    details: of all images; where they agree on low or high, they stand for the resolution.
    """
    if chat.vtengine is None and details <= {None}:
        return base
    own = chat.vtengine or Extension()
    resolution: Resolution = base.resolution
    if own.resolution is not None:
        resolution = own.resolution
    elif details == {"low"} or details == {"high"}:
        resolution = "low" if "low" in details else "high"
    if own.max_turns is not None and own.max_turns > base.max_turns:
        raise invalid("vtengine.max_turns", f"must be at most {base.max_turns} here", value=own.max_turns)
    for name in ("visual_token_budget", "scale"):
        asked, most = getattr(own, name), getattr(base, name)
        if asked is not None and most is not None and asked > most:
            raise invalid(f"vtengine.{name}", f"must be at most {most} here", value=asked)
    return replace(
        base,
        resolution=resolution,
        max_turns=own.max_turns or base.max_turns,
        visual_token_budget=own.visual_token_budget or base.visual_token_budget,
        scale=own.scale or base.scale,
    )


def _read_messages(chat: ChatRequest, limits: ServerLimits) -> tuple[_Images, list[Exchange], str]:
    """(images, earlier exchanges, the question). The text of system messages goes before the first question; user
    messages in a row are one question."""
    images = _Images()
    system: list[str] = []
    questions: list[str] = []
    answers: list[str] = []
    for index, message in enumerate(chat.messages):
        where = f"messages[{index}]"
        if isinstance(message, SystemMessage):
            if questions:
                raise invalid(where, "a system message stands before the first user message", "message_order")
            system.append("".join(part.text for part in message.content))
        elif isinstance(message, UserMessage):
            if len(questions) == len(answers):
                questions.append("")
            text = _read_user(message, where, images, limits, len(answers))
            questions[-1] = "\n\n".join(filter(None, (questions[-1], text)))
        else:
            assert isinstance(message, AssistantMessage)
            if len(answers) >= len(questions):
                raise invalid(where, "an assistant message stands after a user message", "message_order")
            answers.append("".join(part.text for part in message.content or ()))
    num_chars = sum(map(len, (*system, *questions, *answers)))
    if num_chars > limits.max_text_chars:
        message_ = f"{num_chars} characters of text, at most {limits.max_text_chars} are accepted"
        raise invalid("messages", message_, "text_too_long")
    if len(questions) == len(answers):
        raise invalid("messages", "the last message must be the user's", "message_order")
    if not questions[-1].strip():
        raise invalid(f"messages[{len(chat.messages) - 1}].content", "no question in it", "question_missing")
    questions[0] = "".join(f"{text}\n\n" for text in system if text) + questions[0]
    exchanges = [Exchange(*pair) for pair in zip(questions, answers, strict=False)]
    return images, exchanges, questions[-1]


def _read_user(message: UserMessage, where: str, images: _Images, limits: ServerLimits, question: int) -> str:
    """The text; images go into `images`. The same image again, as some clients send it, is no second one."""
    texts: list[str] = []
    for number, part in enumerate(message.content):
        if not isinstance(part, ImagePart):
            texts.append(part.text)
            continue
        param, url = f"{where}.content[{number}].image_url", part.image_url.url
        images.num_parts += 1
        if images.num_parts > limits.max_images:
            raise invalid(param, f"at most {limits.max_images} image parts are accepted", "too_many_images")
        if not url[:8].lower().startswith(_SCHEMES):
            message_ = "must be a data: URL, or http(s) where allowed"
            raise invalid(f"{param}.url", message_, "image_url_not_allowed", value=url)
        if url not in images.urls:
            images.details.add(part.image_url.detail)
            images.urls.append(url)
            images.params.append(f"{param}.url")
            images.places.append(question)
    return "\n".join(texts)
