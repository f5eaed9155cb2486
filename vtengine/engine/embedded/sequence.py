"""One request on its way through the engine: its tokens, its pages, what was computed and what was sampled."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vtengine.engine.embedded.radix import PageKey, page_keys, token_keys

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vtengine.engine.base import Finish, ImageInput, Request
    from vtengine.engine.embedded.caller import Caller

_arrivals = itertools.count()


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where an image's placeholders lie in the prompt: tokens begin..end-1."""

    image: ImageInput
    begin: int
    end: int


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable; owned by the engine's thread once submitted.

    tokens: prompt and sampled ids. positions: int64 [3, P] of the prompt; a later token i has position i + delta on
    all three axes. pages: the page table; its first `num_shared` pages are in the radix tree too. num_computed: tokens
    whose keys and values are in the pages. slot: the row of the runner's tables while running, else -1.
    num_pending: tokens that launched passes sample; they are not known yet, so not among `tokens`. place: where the
    last of them lies among those of its pass (see `sampled`).
    held: stays in the queue until its images are encoded, unless nothing else runs.
    rank: its place in every order: the oldest conversation first, then the first to arrive.
    """

    request: Request
    keys: list[int]
    spans: tuple[ImageSpan, ...]
    positions: np.ndarray
    delta: int
    seed: int
    submitted_s: float
    caller: Caller | None = None
    arrival: int = field(default_factory=lambda: next(_arrivals))
    rank: tuple[float, int] = field(init=False)
    tokens: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_shared: int = 0
    num_computed: int = 0
    num_pending: int = 0
    place: int = -1
    cached_tokens: int = -1
    slot: int = -1
    held: bool = False
    finish: Finish | None = None
    first_token_s: float = 0.0
    encoded: list[bool] = field(init=False)
    features: dict[int, torch.Tensor] = field(default_factory=dict)
    _page_keys: list[PageKey] = field(default_factory=list)

    def __post_init__(self) -> None:
        began_s = self.request.began_s
        self.rank = (self.submitted_s if began_s is None else began_s, self.arrival)
        self.tokens = list(self.request.token_ids)
        self.num_prompt = len(self.tokens)
        self.encoded = [False] * len(self.spans)

    @property
    def num_outputs(self) -> int:
        """Sampled tokens, with those that are not known yet."""
        return len(self.tokens) - self.num_prompt + self.num_pending

    @property
    def is_full(self) -> bool:
        return self.num_outputs >= self.request.sampling.max_new_tokens

    @property
    def num_remaining(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) + self.num_pending - self.num_computed

    def page_keys(self, num_tokens: int, page_size: int) -> list[PageKey]:
        """Keys of the pages with the first `num_tokens` tokens, which must be there; the last one may be short."""
        count, known = num_tokens // page_size, len(self._page_keys)
        if count > known:
            self._page_keys += page_keys(self.keys[known * page_size : count * page_size], page_size)
        rest = tuple(self.keys[count * page_size : num_tokens])
        return [*self._page_keys[:count], rest] if rest else self._page_keys[:count]

    def append(self, token_id: int, logprob: float) -> None:
        """The first of the pending tokens is known."""
        self.num_pending -= 1
        self.tokens.append(token_id)
        self.keys.append(token_id)
        self.logprobs.append(logprob)


def image_spans(
    token_ids: tuple[int, ...], images: tuple[ImageInput, ...], image_token_id: int
) -> tuple[ImageSpan, ...]:
    """Where each image lies; the placeholders must have been checked against the images."""
    spans, cursor = [], 0
    for image in images:
        begin = token_ids.index(image_token_id, cursor)
        cursor = begin + image.visual_tokens
        spans.append(ImageSpan(image, begin, cursor))
    return tuple(spans)


def prompt_keys(request: Request, image_token_id: int) -> list[int]:
    return token_keys(request.token_ids, request.images, image_token_id)
