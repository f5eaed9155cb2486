"""Chunks of SGLang's answer into `TokenChunk`s and a `Completion`; whatever does not add up is an error."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtengine.engine.base import BackendFailed, Completion, Finish, RequestRejected
from vtengine.engine.sglang.transport import NoRoom, StaleWeights

if TYPE_CHECKING:
    from vtengine.engine.base import Request
    from vtengine.engine.sglang.translation import Span
    from vtengine.protocol.messages import Blame

UNAVAILABLE = (429, 503)
NO_SUCH_CALL = (404, 405)
FIRST_VERSION = "default"  # what SGLang calls weights that were never updated


@dataclass(frozen=True)
class TokenChunk:
    """New ids of an answer; the last chunk has its `completion`."""

    token_ids: tuple[int, ...]
    completion: Completion | None = None


def version_number(version: object) -> int:
    """The weight version of a reply as a number; 0 for weights that carry none."""
    text = str(version)
    return int(text) if text.isascii() and text.isdigit() else 0


class ReplyReader:
    """One request's answer. `incremental`: chunks hold new ids only.

    Counts an image as encoded unless its placeholders lie in the cached prefix: SGLang does not say for which images
    its vision tower ran, so this is the most that it can have run (it may have found features in its own cache).
    """

    def __init__(self, request: Request, spans: list[Span], incremental: bool, version: int) -> None:
        self._request, self._spans, self._incremental, self._version = request, spans, incremental, version
        self._started_s = time.perf_counter()
        self._first_s: float | None = None
        self._ids: list[int] = []
        self._logprobs: list[float] = []

    @property
    def started(self) -> bool:
        return self._first_s is not None

    def push(self, chunk: dict[str, Any]) -> TokenChunk | None:
        """None for a chunk without anything new. Raises BackendFailed or RequestRejected."""
        if "error" in chunk:
            self._raise(chunk["error"])
        try:
            meta, ids = chunk["meta_info"], chunk["output_ids"]
            reason = meta["finish_reason"]
            if reason is not None and reason["type"] == "abort":
                self._check_abort(reason)
            new = self._take(ids, meta.get("output_token_logprobs") or [])
        except (KeyError, TypeError, ValueError) as error:
            raise BackendFailed(
                f"{self._name}: SGLang's answer cannot be read: {error!r} in {str(chunk)[:200]}"
            ) from None
        self._check_prompt(meta.get("prompt_tokens"), chunk.get("prompt_token_ids"))
        if new and self._first_s is None:
            self._first_s = time.perf_counter()
        if reason is not None:
            return TokenChunk(new, self._completion(meta, reason))
        return TokenChunk(new) if new else None

    @property
    def _name(self) -> str:
        return f"request {self._request.request_id}"

    def _take(self, ids: list[int], logprobs: list[tuple[float, int, Any]]) -> tuple[int, ...]:
        """What is new in this chunk, after comparing ids and logprobs."""
        if [int(entry[1]) for entry in logprobs] != list(ids):
            raise BackendFailed(f"{self._name}: SGLang sent {len(ids)} ids and logprobs of {len(logprobs)} others")
        begin = 0 if self._incremental else len(self._ids)
        if begin > len(ids) or (begin and list(ids[:begin]) != self._ids):
            raise BackendFailed(f"{self._name}: SGLang changed ids that it had sent already")
        new = tuple(int(token_id) for token_id in ids[begin:])
        self._ids += new
        self._logprobs += [min(float(entry[0]), 0.0) for entry in logprobs[begin:]]
        return new

    def _check_prompt(self, count: object, ids: list[int] | None) -> None:
        ours = self._request.token_ids
        if count != len(ours):
            raise RequestRejected(
                "prompt_mismatch",
                f"{self._name}: SGLang read a prompt of {count} tokens, ours has {len(ours)}: it tokenised or resized "
                "anew, so its answer belongs to another prompt (does its checkpoint equal ours, "
                "preprocessor_config.json included?)",
                "setup",
            )
        if ids is not None and tuple(ids) != ours:
            at = next(i for i, (theirs, own) in enumerate(zip(ids, ours, strict=True)) if theirs != own)
            raise RequestRejected(
                "prompt_mismatch",
                f"{self._name}: SGLang read another prompt than ours: id {ids[at]} at place {at}, ours has {ours[at]}",
                "setup",
            )

    def _check_abort(self, reason: dict[str, Any]) -> None:
        status = reason.get("status_code")
        if status is not None:
            self._raise({"code": status, "message": reason.get("message")})

    def _raise(self, error: Any) -> None:
        """An error that SGLang reports in the middle of a stream."""
        code, text = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, error)
        raise_for_status(self._name, code, str(text))

    def _completion(self, meta: dict[str, Any], reason: dict[str, Any]) -> Completion:
        finish: Finish = {"stop": "stop", "length": "length", "abort": "cancelled"}.get(reason["type"], "error")  # type: ignore[assignment]
        now, prompt = time.perf_counter(), len(self._request.token_ids)
        found = meta.get("weight_version", FIRST_VERSION)
        if version_number(found) != self._version:
            raise StaleWeights(
                f"{self._name}: SGLang answered with weights {found!r}, version {self._version} was loaded; somebody "
                "else updated it, or it was restarted: load the weights again"
            )
        cached = min(int(meta.get("cached_tokens", 0)), prompt)
        return Completion(
            request_id=self._request.request_id,
            token_ids=tuple(self._ids),
            logprobs=tuple(self._logprobs),
            finish=finish,
            prompt_tokens=prompt,
            cached_tokens=cached,
            images_encoded=tuple(end > cached for _, end in self._spans),
            weight_version=self._version,
            ttft_s=(self._first_s or now) - self._started_s,
            latency_s=now - self._started_s,
        )


def raise_for_status(name: str, status: int | None, text: str) -> None:
    """An error status of SGLang as the fault it is: try again, broken, or refused for good."""
    text = " ".join(text.split())[:300]
    if status in UNAVAILABLE:
        raise NoRoom(f"{name}: SGLang has no room now ({status}): {text}")
    if status in (401, 403):
        raise RequestRejected("not_authorized", f"{name}: SGLang refused the API key ({status}): {text}", "setup")
    if status is not None and 400 <= status < 500:
        blame: Blame = "setup" if status in NO_SUCH_CALL else "unclear"
        raise RequestRejected("refused_by_server", f"{name}: SGLang refused it ({status}): {text}", blame)
    raise BackendFailed(f"{name}: SGLang failed ({status}): {text}")
