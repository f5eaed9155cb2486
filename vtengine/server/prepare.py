"""From an OpenAI request to what the episode loop takes: one question, one image, limits, sampling."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vtengine.protocol.conversation import Limits
from vtengine.protocol.messages import Exchange, Resolution
from vtengine.rollout.group import Setting
from vtengine.rollout.question import Question
from vtengine.server.config import ServerLimits
from vtengine.server.errors import invalid
from vtengine.server.schema import AssistantMessage, ChatRequest, ImagePart, SystemMessage, UserMessage

_SCHEMES = ("data:", "http://", "https://")


@dataclass(frozen=True)
class Job:
    """max_tokens: of all turns together. stops: cut the answer. image_param: the field that holds the image."""

    setting: Setting
    question: Question
    image_param: str
    max_tokens: int | None
    stops: tuple[str, ...]
    streams: bool
    with_usage: bool


@dataclass
class _Turns:
    """What the messages hold beside questions and answers: the image and where it stands, and the system text."""

    image: str | None = None
    image_param: str = ""
    detail: str | None = None
    num_images: int = 0
    system: str = ""


def prepare(chat: ChatRequest, setting: Setting, limits: ServerLimits, request_id: str) -> Job:
    """Raises ApiError 400 naming the field that the protocol has no place for."""
    found, exchanges, question = _read_messages(chat, limits)
    if found.image is None:
        raise invalid("messages", "no image; add a part of type image_url to the first user message", "image_missing")
    sampling = replace(
        setting.sampling,
        temperature=setting.sampling.temperature if chat.temperature is None else chat.temperature,
        top_p=setting.sampling.top_p if chat.top_p is None else chat.top_p,
        seed=setting.sampling.seed if chat.seed is None else chat.seed,
    )
    asked = [value for value in (chat.max_tokens, chat.max_completion_tokens) if value is not None]
    return Job(
        setting=replace(setting, limits=_limits(chat, setting.limits, found.detail), sampling=sampling),
        question=Question(request_id, found.image, question, history=tuple(exchanges)),
        image_param=found.image_param,
        max_tokens=min(asked, default=None),
        stops=tuple(chat.stop or ()),
        streams=bool(chat.stream),
        with_usage=bool(chat.stream_options and chat.stream_options.include_usage),
    )


def _limits(chat: ChatRequest, base: Limits, detail: str | None) -> Limits:
    """The server's own limits, tightened by the request's; the resolution is free to choose."""
    own = chat.vtengine
    resolution: Resolution = base.resolution
    if detail == "low":
        resolution = "low"
    elif detail == "high":
        resolution = "high"
    if own is not None and own.resolution is not None:
        resolution = own.resolution
    turns, budget = base.max_turns, base.visual_token_budget
    if own is not None and own.max_turns is not None:
        if own.max_turns > base.max_turns:
            raise invalid("vtengine.max_turns", f"at most {base.max_turns} turns are allowed here")
        turns = own.max_turns
    if own is not None and own.visual_token_budget is not None:
        if budget is not None and own.visual_token_budget > budget:
            raise invalid("vtengine.visual_token_budget", f"at most {budget} visual tokens are allowed here")
        budget = own.visual_token_budget
    return replace(base, resolution=resolution, max_turns=turns, visual_token_budget=budget)


def _read_messages(chat: ChatRequest, limits: ServerLimits) -> tuple[_Turns, list[Exchange], str]:
    """(image and system text, earlier exchanges, the question)."""
    found = _Turns()
    questions: list[str] = []
    answers: list[str] = []
    num_chars = 0
    for index, message in enumerate(chat.messages):
        where = f"messages[{index}]"
        if isinstance(message, SystemMessage):
            if questions:
                raise invalid(where, "a system message stands before the first user message", "message_order")
            text = "".join(part.text for part in message.content)
            found.system += text + "\n\n" if text else ""
            num_chars += len(text)
        elif isinstance(message, UserMessage):
            if len(questions) > len(answers):
                raise invalid(where, "two user messages in a row; join them", "message_order")
            questions.append(_read_user(message, where, found, limits, is_first=not questions))
            num_chars += len(questions[-1])
        else:
            assert isinstance(message, AssistantMessage)
            if len(answers) >= len(questions):
                raise invalid(where, "an assistant message stands after a user message", "message_order")
            answers.append("".join(part.text for part in message.content or ()))
            num_chars += len(answers[-1])
    if num_chars > limits.max_text_chars:
        message_ = f"{num_chars} characters of text, at most {limits.max_text_chars} are accepted"
        raise invalid("messages", message_, "text_too_long")
    if len(questions) == len(answers):
        raise invalid("messages", "the last message must be the user's", "message_order")
    if not questions[-1].strip():
        raise invalid(f"messages[{len(chat.messages) - 1}].content", "no question in it", "question_missing")
    questions[0] = found.system + questions[0]
    exchanges = [Exchange(*pair) for pair in zip(questions, answers, strict=False)]
    return found, exchanges, questions[-1]


def _read_user(message: UserMessage, where: str, found: _Turns, limits: ServerLimits, *, is_first: bool) -> str:
    """The text; the image goes into `found`. The same image again, as some clients send it, is no second one."""
    texts: list[str] = []
    for number, part in enumerate(message.content):
        if not isinstance(part, ImagePart):
            texts.append(part.text)
            continue
        param, url = f"{where}.content[{number}].image_url", part.image_url.url
        found.num_images += 1
        if found.num_images > limits.max_images:
            raise invalid(param, f"at most {limits.max_images} image parts are accepted", "too_many_images")
        if not url[:8].lower().startswith(_SCHEMES):
            raise invalid(f"{param}.url", "must be a data: URL, or http(s) where allowed", "image_url_not_allowed")
        if found.image is None and not is_first:
            raise invalid(param, "the image stands in the first user message of a conversation", "image_position")
        if found.image is not None and url != found.image:
            message_ = "a second image; a conversation is about one image, send one request for each"
            raise invalid(param, message_, "too_many_images")
        if found.image is None:
            found.image, found.image_param, found.detail = url, f"{param}.url", part.image_url.detail
    return "\n".join(texts)
