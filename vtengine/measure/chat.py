"""Any server that speaks OpenAI's chat completions, measured as its clients see it: streamed, one reply a question."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from vtengine.measure.http import HttpClient, HttpFault, Response
from vtengine.measure.load import Row
from vtengine.protocol.messages import Resolution
from vtengine.vision.header import sniff

DETAILS = {"adaptive": "auto", "low": "low", "high": "high"}
"""What OpenAI's interface calls a resolution. `vtengine serve` obeys it; most servers show the whole image whatever it
says."""
LIST_S = 60.0
"""Longest time that a server may take to list its models."""
ERROR_CHARS = 300


class ChatFailed(Exception):
    """What the server did instead of answering. `code` is stable, for records."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ChatServer:
    """url: the base URL that clients are given (it ends in /v1 as a rule). Belongs to one event loop.

    model: None is the first one that the server lists. options: more keys of each request's body. deadline_s: longest
    time that a reply may take as a whole; None: for ever. Raises ValueError for a url or an api_key that cannot be one.
    """

    def __init__(
        self, url: str, model: str | None, api_key: str | None, options: Mapping[str, Any], deadline_s: float | None
    ) -> None:
        self.model, self._options, self._deadline_s = model, dict(options), deadline_s
        self._http = HttpClient(url, api_key)

    def close(self) -> None:
        self._http.close()

    async def find_model(self) -> None:
        """Raises ChatFailed where it is not there, or has no such model."""
        try:
            async with asyncio.timeout(LIST_S), self._http.request("GET", "models") as response:
                body = await response.read()
            if response.status != 200:
                hint = "; base URLs end in /v1 as a rule" if response.status == 404 else ""
                raise ChatFailed("unreachable", f"/models answers {response.status}: {_excerpt(body)}{hint}")
            names = [str(card["id"]) for card in json.loads(body)["data"]]
        except (HttpFault, TimeoutError, ValueError, KeyError, TypeError) as error:
            raise ChatFailed("unreachable", f"does not list its models at /models: {error or 'no answer'}") from None
        if not names or (self.model is not None and self.model not in names):
            raise ChatFailed("model_unknown", f"has no model {self.model}; it has {', '.join(names) or 'none'}")
        self.model = self.model or names[0]

    def body(self, question: str, image: bytes | None, resolution: Resolution) -> bytes:
        """Of a request. image: the bytes of a file, or None."""
        content: list[dict[str, Any]] = []
        if image is not None:
            kind = (sniff(image) or "png").lower()
            url = f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"
            content.append({"type": "image_url", "image_url": {"url": url, "detail": DETAILS[resolution]}})
        content.append({"type": "text", "text": question})
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(
            {"model": self.model, "messages": [{"role": "user", "content": content}], **streamed, **self._options}
        ).encode()

    async def answer(self, row_id: str | int, body: bytes) -> Row:
        """A row as `vtengine generate` writes it, with the whole reply as its only turn; its times are the client's."""
        began, reply = time.perf_counter(), _Reply()
        exchange = self._http.request("POST", "chat/completions", body)
        del body
        try:
            async with asyncio.timeout(self._deadline_s), exchange as response:
                if response.status != 200:
                    raise ChatFailed(f"http_{response.status}", _excerpt(await response.read()))
                async for event in _events(response):
                    reply.read(event, time.perf_counter() - began)
            reply.check()
        except ChatFailed as fault:
            return failed(row_id, fault.code, str(fault), time.perf_counter() - began)
        except HttpFault as fault:
            return failed(row_id, "connection_lost", str(fault), time.perf_counter() - began)
        except TimeoutError:
            message = f"not done after {self._deadline_s:g} s (--deadline-s)"
            return failed(row_id, "deadline_exceeded", message, time.perf_counter() - began)
        return reply.row(row_id, time.perf_counter() - began)


async def _events(response: Response) -> AsyncIterator[dict[str, Any]]:
    """Of a stream, as far as they have data. Raises ChatFailed, HttpFault."""
    rest = b""
    async for piece in response.pieces():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                yield _object(data)


def _excerpt(body: bytes) -> str:
    return " ".join(body[: 4 * ERROR_CHARS].decode("utf-8", "replace").split())[:ERROR_CHARS]


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

    def row(self, row_id: str | int, latency_s: float) -> Row:
        views = [view for turn in _objects(self.extension, "turns") for view in _objects(turn, "views")]
        details = _mapping(self.usage.get("prompt_tokens_details"))
        prompt = _count(self.usage.get("prompt_tokens"))
        cached = min(prompt, _count(details.get("cached_tokens")))
        turn = {
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "prefill_tokens": prompt - cached,
            "completion_tokens": _count(self.usage.get("completion_tokens")),
            "images": views,
            "latency_s": latency_s,
            "ttft_s": self.first_s,  # None where no text came
        }
        return _row(row_id, "truncated" if self.finish == "length" else "answered", latency_s) | {
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
