"""The body of POST /v1/chat/completions. Fields that would change the reply and are not there are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from vtengine.protocol.messages import Resolution
from vtengine.server.errors import invalid
from vtengine.server.faults import refusal, unknown

MAX_STOPS, MAX_STOP_CHARS = 4, 256
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("medium",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
    "min_p": (0,),
    "repetition_penalty": (1,),
}
"""Not supported: accepted with one of these values (or null), which ask for nothing or for the default. The last two
are no options of OpenAI's: clients of vLLM and SGLang send them."""

CACHE_ADVICE = ("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention")
IGNORED = frozenset(("user", "metadata", "store", "service_tier", "safety_identifier", *CACHE_ADVICE))
"""These do not change the reply."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class _Part(_Strict):
    """What it says of a prompt cache is passed over, as for the whole request: ours needs no advice."""

    cache_control: Any = None
    prompt_cache_breakpoint: Any = None


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class SaidPart(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text"]
    text: str


Texts = Annotated[list[TextPart], Field(fail_fast=True), BeforeValidator(_as_parts)]
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(fail_fast=True), BeforeValidator(_as_parts)]


class UserMessage(_Strict):
    role: Literal["user"]
    content: Parts
    name: str | None = None


class SystemMessage(_Strict):
    role: Literal["system", "developer"]
    content: Texts
    name: str | None = None


class AssistantMessage(BaseModel):
    """What a client got from us before: its content counts, the rest (reasoning_content, refusal, a part's annotations)
    is passed over."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["assistant"]
    content: Annotated[list[SaidPart], Field(fail_fast=True), BeforeValidator(_as_parts)] | None = None
    tool_calls: list[Any] | None = None

    @field_validator("tool_calls")
    @classmethod
    def _none(cls, value: list[Any] | None) -> None:
        if value:
            raise ValueError("earlier tool calls are not supported; leave them out")


Message = Annotated[UserMessage | SystemMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Extension(_Strict):
    """What OpenAI's interface has no word for. `detail` of an image stands for `resolution` where this is not given."""

    resolution: Resolution | None = None
    max_turns: Annotated[int, Field(ge=1)] | None = None
    visual_token_budget: Annotated[int, Field(ge=1)] | None = None
    scale: Annotated[float, Field(gt=0.5, le=1)] | None = None


class ChatRequest(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Annotated[list[str], Field(fail_fast=True), BeforeValidator(_as_list)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    vtengine: Extension | None = None

    @field_validator("top_k")
    @classmethod
    def _off(cls, value: int | None) -> int | None:
        """-1 is off at SGLang and vLLM, 0 here."""
        return 0 if value == -1 else value

    @field_validator("top_logprobs")
    @classmethod
    def _sampled_only(cls, value: int | None) -> int | None:
        if value:
            raise ValueError("must be 0 or left out: engines give the logprob of the sampled token alone")
        return value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: list[str] | None) -> list[str] | None:
        if value and (len(value) > MAX_STOPS or not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in value)):
            raise ValueError(f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters")
        return value


def parse_chat(body: bytes) -> ChatRequest:
    """Reads a body. Raises ApiError 400 whose `param` is the field at fault."""
    try:
        chat = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error, {"vtengine": Extension.model_fields}) from None
    for name, value in (chat.model_extra or {}).items():
        if name in IGNORED or value is None:
            continue
        if name not in NEUTRAL:
            raise unknown("parameter", name, name, (*ChatRequest.model_fields, *IGNORED))
        if not any((value == neutral and type(value) is not bool) or value is neutral for neutral in NEUTRAL[name]):
            raise invalid(name, "is not supported by this server; leave it out", "unsupported_parameter", value=value)
    return chat
