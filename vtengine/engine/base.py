"""What every rollout engine offers: token ids and pixels in, token ids and logprobs out.

Callers (`vtengine.rollout`, `vtengine.server`) know this module only, never an implementation.
Conformance tests run against each `Backend`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from vtengine.protocol.messages import Blame
from vtengine.vision.image_input import ImageInput as ImageInput

if TYPE_CHECKING:
    from pathlib import Path

    import torch

Finish = Literal["stop", "length", "cancelled", "error"]
GAUGES = frozenset(
    ("running", "waiting", "pages_total", "pages_in_use", "pages_cached", "vision_cache_bytes", "weight_version")
)
"""Those of an engine's figures (`Backend.stats`) that are of now. All others count, and never fall."""


class RequestRejected(ValueError):
    """The request can never be served (too long for the pool, malformed). `code` is stable, for records.

    blame: whose fault it is. A trainer leaves out an example that is to blame, and stops where the setup is.
    """

    def __init__(self, code: str, message: str, blame: Blame = "request") -> None:
        super().__init__(message)
        self.code, self.blame = code, blame


class BackendFailed(RuntimeError):
    """The engine broke while serving; the request may be tried again."""


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. `seed` makes a sample independent of whatever else is in the batch.

    logit_bias: added to the raw logits before temperature; -inf bans an id.
    stop: strings; the text is cut after none of them (they stay in the ids), generation ends once one appears.
    stop_token_ids: end the turn; kept as the last id of the completion.
    Logprobs returned are those of the distribution sampled from (after temperature, bias and truncation).
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, ">= 1"),
            (0 <= self.temperature < math.inf, "temperature", self.temperature, ">= 0 and finite"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]"),
            (self.top_k >= 0, "top_k", self.top_k, ">= 0 (0 = off)"),
            (0 <= self.min_p < 1, "min_p", self.min_p, "in [0, 1)"),
        )
        for ok, name, value, allowed in checks:
            if not ok:
                raise ValueError(f"sampling.{name} = {value}: must be {allowed}")


@dataclass(frozen=True)
class Request:
    """token_ids hold image placeholders already expanded: one image-pad id per visual token, images in order.

    began_s: `time.perf_counter()` when the conversation began that this request is a turn of (None: with this request).
    An engine with a queue of its own serves the oldest conversation first.
    """

    request_id: str
    token_ids: tuple[int, ...]
    images: tuple[ImageInput, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    began_s: float | None = None


@dataclass(frozen=True)
class Completion:
    """token_ids: sampled ids with the stop id; logprobs: one per id, natural log.

    cached_tokens + prefill_tokens = prompt_tokens.

    images_encoded: per image of the request, whether the vision tower ran for it because of this request.
    ttft_s and latency_s count from submission to first and last token.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    images_encoded: tuple[bool, ...]
    weight_version: int
    ttft_s: float
    latency_s: float

    @property
    def prefill_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


OnTokens = Callable[[Sequence[int]], None]
"""Is given newly sampled ids, at least one, in the caller's event loop. What it raises ends the request."""


class Backend(Protocol):
    """An engine. Coroutines may be called concurrently from one event loop; cancelling the task cancels the request."""

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        """Raises RequestRejected (never servable) or BackendFailed (try again).

        on_tokens: is called as ids are sampled; what it got, joined, is the completion's ids when this returns. It is
        not called any more once the caller has gone, with the completion or without.
        """
        ...

    async def load_weights(self, source: Path | Mapping[str, torch.Tensor], version: int) -> None:
        """Replaces weights in place and drops every cache computed with the old ones."""
        ...

    def stats(self) -> dict[str, float]:
        """Counters, and GAUGES; flat, with units in the names."""
        ...

    async def close(self) -> None: ...
