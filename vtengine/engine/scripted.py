"""A backend that replays canned replies: for tests, demonstrations and benchmarks without a model.

Token accounts are those of a perfect prefix cache with pages of one token: everything seen before, in this order and
with these images, is cached, except the last token of a prompt, which is always computed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

from vtengine.engine.base import BackendFailed, Completion, Finish, OnTokens, Request, RequestRejected

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch

Reply = str | Exception


class Encoder(Protocol):
    """The one method of a tokenizer that is needed here."""

    def encode_trusted(self, text: str) -> Sequence[int]: ...


class ScriptedBackend:
    """Answers the n-th request with the n-th reply, or each request with `replies(request)`.

    replies: texts (an Exception is raised instead of answered); running out of them raises BackendFailed.
    A reply ends at the first stop string of the request, else with the request's first stop id, and is cut at
    max_new_tokens (finish "length"). Every logprob is `logprob`. `requests` keeps what was asked.
    delay_s: before each reply; token_s: before each token of one that is streamed.
    """

    def __init__(
        self,
        tokenizer: Encoder,
        replies: Sequence[Reply] | Callable[[Request], Reply],
        *,
        delay_s: float = 0.0,
        token_s: float = 0.0,
        logprob: float = -0.125,
        image_token_id: int | None = None,
    ) -> None:
        self.requests: list[Request] = []
        self._tokenizer = tokenizer
        self._replies = replies
        self._delay_s, self._token_s = delay_s, token_s
        self._logprob = logprob
        self._image_token_id = self._find_image_token() if image_token_id is None else image_token_id
        self._weight_version = 0
        self._prefixes: dict[object, Any] = {}
        self._images_seen: set[tuple[str, tuple[int, int, int]]] = set()
        self._counters: Counter[str] = Counter()

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        started = time.perf_counter()
        keys = self._keys(request)
        reply = self._next_reply(request)
        await asyncio.sleep(self._delay_s)
        if isinstance(reply, Exception):
            raise reply
        token_ids, finish = self._cut(reply, request)
        encoded = self._encode_images(request)
        cached = self._account(keys, token_ids)
        if on_tokens is not None:
            for token_id in token_ids:
                if self._token_s:
                    await asyncio.sleep(self._token_s)
                on_tokens((token_id,))
        elapsed_s = time.perf_counter() - started
        return Completion(
            request_id=request.request_id,
            token_ids=token_ids,
            logprobs=(self._logprob,) * len(token_ids),
            finish=finish,
            prompt_tokens=len(keys),
            cached_tokens=cached,
            images_encoded=encoded,
            weight_version=self._weight_version,
            ttft_s=elapsed_s,
            latency_s=elapsed_s,
        )

    async def load_weights(self, source: Path | Mapping[str, torch.Tensor], version: int) -> None:
        del source
        self._weight_version = version
        self._prefixes.clear()
        self._images_seen.clear()

    def stats(self) -> dict[str, float]:
        names = (
            "requests",
            "prefill_tokens",
            "cached_tokens",
            "generated_tokens",
            "images_encoded",
            "vision_cache_hits",
        )
        return {name: float(self._counters[name]) for name in names}

    async def close(self) -> None:
        self._prefixes.clear()

    def _find_image_token(self) -> int | None:
        token_ids = self._tokenizer.encode_trusted("<|image_pad|>")
        return token_ids[0] if len(token_ids) == 1 else None

    def _keys(self, request: Request) -> list[object]:
        """Token ids, with the k-th placeholder of an image replaced by (content hash, grid, k)."""
        if not request.token_ids:
            raise RequestRejected("empty_prompt", f"request {request.request_id}: token_ids is empty", "setup")
        placeholders = ((i.content_hash, i.grid_thw, k) for i in request.images for k in range(i.visual_tokens))
        keys: list[object] = [next(placeholders, None) if t == self._image_token_id else t for t in request.token_ids]
        if None in keys or next(placeholders, None) is not None:
            wanted = sum(image.visual_tokens for image in request.images)
            found = sum(t == self._image_token_id for t in request.token_ids)
            message = f"request {request.request_id}: {found} image placeholders for {wanted} visual tokens"
            raise RequestRejected("image_tokens_mismatch", message, "setup")
        return keys

    def _next_reply(self, request: Request) -> Reply:
        index = len(self.requests)
        self.requests.append(request)
        if callable(self._replies):
            return self._replies(request)
        if index >= len(self._replies):
            return BackendFailed(f"scripted backend: request {index + 1}, but only {len(self._replies)} replies")
        return self._replies[index]

    def _cut(self, reply: str, request: Request) -> tuple[tuple[int, ...], Finish]:
        sampling = request.sampling
        ends = [reply.index(stop) + len(stop) for stop in sampling.stop if stop in reply]
        token_ids = list(self._tokenizer.encode_trusted(reply[: min(ends)] if ends else reply))
        stops = [k for k, token_id in enumerate(token_ids) if token_id in sampling.stop_token_ids]
        if stops:
            token_ids = token_ids[: stops[0] + 1]
        elif sampling.stop_token_ids and not ends:
            token_ids.append(sampling.stop_token_ids[0])
        finished = len(token_ids) <= sampling.max_new_tokens
        return tuple(token_ids[: sampling.max_new_tokens]), "stop" if finished else "length"

    def _encode_images(self, request: Request) -> tuple[bool, ...]:
        encoded = []
        for image in request.images:
            key = (image.content_hash, image.grid_thw)
            encoded.append(key not in self._images_seen)
            self._images_seen.add(key)
        self._counters["images_encoded"] += sum(encoded)
        self._counters["vision_cache_hits"] += len(encoded) - sum(encoded)
        return tuple(encoded)

    def _account(self, keys: list[object], token_ids: tuple[int, ...]) -> int:
        """Returns the length of the longest known prefix of `keys`; remembers keys + token_ids."""
        node, cached, matching = self._prefixes, 0, True
        for key in [*keys, *token_ids]:
            matching = matching and key in node
            cached += matching
            node = node.setdefault(key, {})
        cached = min(cached, len(keys) - 1)
        self._counters["requests"] += 1
        self._counters["cached_tokens"] += cached
        self._counters["prefill_tokens"] += len(keys) - cached
        self._counters["generated_tokens"] += len(token_ids)
        return cached
