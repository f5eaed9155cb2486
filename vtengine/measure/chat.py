"""Any server that speaks OpenAI's chat completions, measured as its clients see it: streamed, one reply a question."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from vtengine.measure.load import Row
from vtengine.protocol.messages import Resolution

DETAILS = {"adaptive": "auto", "low": "low", "high": "high"}
"""What OpenAI's interface calls a resolution. `vtengine serve` obeys it; most servers show the whole image whatever it
says."""
CONNECT_S = 10.0
ERROR_CHARS = 300


class ChatFailed(Exception):
    """What the server did instead of answering. `code` is stable, for records."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Ask:
    """image: the bytes of a file, or None; media_type: of it, such as image/png."""

    id: str | int
    question: str
    image: bytes | None
    media_type: str
    resolution: Resolution


class ChatServer:
    """url: the base URL that clients are given (it ends in /v1 as a rule). Belongs to one event loop.

    model: None is the first one that the server lists. options: more keys of each request's body.
    """

    def __init__(self, url: str, model: str | None, api_key: str | None, options: Mapping[str, Any]) -> None:
        try:
            import httpx
        except ImportError:
            raise ValueError("an HTTP client is missing: pip install 'vtengine[sglang]'") from None
        self._errors = (httpx.HTTPError, httpx.InvalidURL)
        self._model, self._options = model, dict(options)
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> ChatServer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def find_model(self) -> str:
        """Raises ChatFailed where it is not there, or has no such model."""
        try:
            response = await self._client.get("models")
            response.raise_for_status()
            names = [str(card["id"]) for card in response.json()["data"]]
        except (*self._errors, ValueError, KeyError, TypeError) as error:
            raise ChatFailed("unreachable", f"does not list its models at /models: {error or type(error)}") from None
        if not names or (self._model is not None and self._model not in names):
            raise ChatFailed("model_unknown", f"has no model {self._model}; it has {', '.join(names) or 'none'}")
        self._model = self._model or names[0]
        return self._model

    async def answer(self, ask: Ask) -> Row:
        """A row as `vtengine generate` writes it, with the whole reply as its only turn; its times are the client's."""
        body = json.dumps(self._body(ask)).encode()
        began = time.perf_counter()
        try:
            reply = _Reply()
            async for event in self._events(body):
                reply.read(event, time.perf_counter() - began)
            reply.check()
        except ChatFailed as fault:
            return failed(ask.id, fault.code, str(fault), time.perf_counter() - began)
        return reply.row(ask, time.perf_counter() - began)

    def _body(self, ask: Ask) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if ask.image is not None:
            url = f"data:{ask.media_type};base64,{base64.b64encode(ask.image).decode('ascii')}"
            content.append({"type": "image_url", "image_url": {"url": url, "detail": DETAILS[ask.resolution]}})
        content.append({"type": "text", "text": ask.question})
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self._model, "messages": [{"role": "user", "content": content}], **streamed, **self._options}

    async def _events(self, body: bytes) -> AsyncIterator[dict[str, Any]]:
        """The events of the stream. Raises ChatFailed."""
        kind = {"Content-Type": "application/json"}
        try:
            async with self._client.stream("POST", "chat/completions", content=body, headers=kind) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode("utf-8", "replace")[:ERROR_CHARS]
                    raise ChatFailed(f"http_{response.status_code}", " ".join(text.split()))
                rest = b""
                async for data in response.aiter_bytes():
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        if line.startswith(b"data:") and (text_of := line[5:].strip()) != b"[DONE]":
                            yield _object(text_of)
        except self._errors as error:
            raise ChatFailed("connection_lost", f"{type(error).__name__}: {error}") from None


def _object(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ChatFailed("reply_invalid", f"an event is not JSON: {error}") from None
    if not isinstance(event, dict):
        raise ChatFailed("reply_invalid", "an event is no JSON object")
    return event


class _Reply:
    """What the events of one reply add up to. They are untrusted: what is missing or odd counts as nothing."""

    def __init__(self) -> None:
        self.text = ""
        self.first_s: float | None = None
        self.finish: str | None = None
        self.usage: dict[str, Any] = {}
        self.extension: dict[str, Any] = {}

    def read(self, event: dict[str, Any], at_s: float) -> None:
        if error := event.get("error"):
            raise ChatFailed("server_error", " ".join(str(error).split())[:ERROR_CHARS])
        self.usage = _mapping(event.get("usage")) or self.usage
        self.extension = _mapping(event.get("vtengine")) or self.extension
        for choice in _objects(event, "choices"):
            delta = _mapping(choice.get("delta"))
            text, thought = delta.get("content"), delta.get("reasoning_content") or delta.get("reasoning")
            if (text or thought) and self.first_s is None:
                self.first_s = at_s
            self.text += text if isinstance(text, str) else ""
            self.finish = choice.get("finish_reason") or self.finish

    def check(self) -> None:
        """Raises ChatFailed where it is not whole, or does not say what it cost."""
        if self.finish is None:
            raise ChatFailed("connection_lost", "the stream ended before the reply did")
        if not self.usage:
            raise ChatFailed("reply_invalid", "no usage in the stream, although stream_options asked for it")

    def row(self, ask: Ask, latency_s: float) -> Row:
        views = [view for turn in _objects(self.extension, "turns") for view in _objects(turn, "views")]
        details = _mapping(self.usage.get("prompt_tokens_details"))
        prompt, cached = _count(self.usage.get("prompt_tokens")), _count(details.get("cached_tokens"))
        turn = {
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "prefill_tokens": prompt - cached,
            "completion_tokens": _count(self.usage.get("completion_tokens")),
            "images": views,
            "latency_s": latency_s,
            "ttft_s": latency_s if self.first_s is None else self.first_s,
        }
        return _row(ask.id, "truncated" if self.finish == "length" else "answered", latency_s) | {
            "answer": self.text,
            "upscaled": self.extension.get("upscaled") is True,
            "turns": [turn],
            "visual_tokens": _count(self.extension.get("visual_tokens")),
            "visual_tokens_full": _count(self.extension.get("visual_tokens_full")),
        }


def failed(row_id: str | int, code: str, message: str, latency_s: float = 0.0) -> Row:
    """The row of a question that got no reply."""
    return _row(row_id, "failed", latency_s) | {"error": {"code": code, "message": message}}


def _row(row_id: str | int, status: str, latency_s: float) -> Row:
    own: Row = {
        "id": row_id,
        "sample": 0,
        "status": status,
        "error": None,
        "answer": None,
        "upscaled": False,
        "turns": [],
    }
    return own | {"visual_tokens": 0, "visual_tokens_full": 0, "latency_s": latency_s}


def _objects(holder: dict[str, Any], name: str) -> list[dict[str, Any]]:
    values = holder.get(name)
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
