"""The token side of an episode: append-only ids, with logprobs, the trainable mask and the images they refer to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vtengine.engine.base import Completion, ImageInput, Request, SamplingParams
from vtengine.protocol.messages import Ask, ImagePart, Text
from vtengine.rollout.seeds import derive_seed
from vtengine.rollout.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

NOT_SAMPLED = 0.0
"""Stands in `logprobs` where the mask is false."""


class ContextFull(ValueError):
    """What is asked next does not fit; nothing was appended."""


class BadCompletion(ValueError):
    """The backend returned what it must not (a banned id, a missing logprob); nothing was appended."""


@dataclass(frozen=True)
class ImageSpan:
    """token_ids[start:end] are the placeholders of `image`, one per visual token."""

    start: int
    end: int
    image: ImageInput


@dataclass(frozen=True)
class SampledSpan:
    """token_ids[start:end] were sampled, by the weights of this version."""

    start: int
    end: int
    weight_version: int


class Transcript:
    """Grows by `append_ask` and `commit`, in turn; nothing already in it ever changes, nothing is re-tokenised.

    token_ids, logprobs, trainable: equally long; trainable is true exactly on sampled ids.
    max_tokens: the longest the context may get, a reply of at least one token included.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int | None = None) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.trainable: list[bool] = []
        self.images: list[ImageSpan] = []
        self.sampled: list[SampledSpan] = []
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._position_pieces: list[torch.Tensor] = []
        self._positioned = 0
        self._next_position = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def append_ask(self, ask: Ask, images: Sequence[ImageInput]) -> None:
        """Renders the ask behind what is there; `images` are those of `ask.views`, in order.

        Closes the reply before it where the model did not (it stopped by another id). Raises ContextFull when that and
        one more id would pass max_tokens: an ask goes in whole, so an image is never cut.
        """
        ids, spans = self._render(ask, images)
        needed = len(self) + len(ids) + 1
        if self.max_tokens is not None and needed > self.max_tokens:
            raise ContextFull(
                f"turn {ask.turn + 1} needs {needed} tokens of context, {self.max_tokens} are allowed; shorten the "
                "text, or show fewer visual tokens"
            )
        self.token_ids += ids
        self.logprobs += [NOT_SAMPLED] * len(ids)
        self.trainable += [False] * len(ids)
        self.images += spans

    def request(self, request_id: str, turn: int, sampling: SamplingParams, began_s: float | None = None) -> Request:
        """Everything so far, to be continued. Bans the markers, adds the stop ids, gives each turn its own seed."""
        room = sampling.max_new_tokens
        if self.max_tokens is not None:
            room = min(room, self.max_tokens - len(self))
        stop_ids = dict.fromkeys((*self._tokenizer.stop_ids, *sampling.stop_token_ids))
        bans = {token_id: float("-inf") for token_id in sorted(self._tokenizer.banned_ids)}
        ours = replace(
            sampling,
            max_new_tokens=room,
            stop_token_ids=tuple(stop_ids),
            logit_bias={**sampling.logit_bias, **bans},
            seed=None if sampling.seed is None else derive_seed(sampling.seed, turn),
        )
        images = tuple(span.image for span in self.images)
        return Request(request_id, tuple(self.token_ids), images, ours, began_s)

    def commit(self, completion: Completion) -> str:
        """Appends sampled ids as they are; returns their text without the closing id. Raises BadCompletion."""
        ids = completion.token_ids
        if len(completion.logprobs) != len(ids):
            raise BadCompletion(f"{len(completion.logprobs)} logprobs for {len(ids)} sampled ids")
        banned = [token_id for token_id in ids if token_id in self._tokenizer.banned_ids]
        if banned:
            raise BadCompletion(f"sampled id {banned[0]}, which is banned")
        if len(completion.images_encoded) != len(self.images):
            raise BadCompletion(f"{len(completion.images_encoded)} image accounts for {len(self.images)} images")
        if ids:
            self.sampled.append(SampledSpan(len(self), len(self) + len(ids), completion.weight_version))
        self.token_ids += ids
        self.logprobs += completion.logprobs
        self.trainable += [True] * len(ids)
        return self._tokenizer.decode(self.without_stop(ids))

    def without_stop(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Sampled ids without the stop id that ends them."""
        return token_ids[:-1] if token_ids and token_ids[-1] in self._tokenizer.stop_ids else token_ids

    @property
    def visual_tokens(self) -> int:
        return sum(span.end - span.start for span in self.images)

    @property
    def logprob_sum(self) -> float:
        return sum(self.logprobs, start=0.0)

    def positions(self) -> torch.Tensor:
        """M-RoPE positions, int64 [3, T] on the CPU; computed once per id, only when asked for."""
        import torch

        from vtengine.model.positions import mrope_positions

        start = self._positioned
        if start < len(self):
            grids = [span.image.grid_thw for span in self.images if span.start >= start]
            piece, self._next_position = mrope_positions(
                self.token_ids[start:], grids, image_token_id=self._tokenizer.image_pad_id, start=self._next_position
            )
            self._position_pieces.append(piece)
            self._positioned = len(self)
        if not self._position_pieces:
            return torch.empty(3, 0, dtype=torch.int64)
        return torch.cat(self._position_pieces, dim=1)

    def check_integrity(self) -> None:
        """Asserts what must hold at any time."""
        size = len(self)
        assert len(self.logprobs) == size and len(self.trainable) == size
        covered = {i for span in self.sampled for i in range(span.start, span.end)}
        assert all(self.trainable[i] == (i in covered) for i in range(size))
        assert all(
            logprob == NOT_SAMPLED for logprob, own in zip(self.logprobs, self.trainable, strict=True) if not own
        )
        pad = self._tokenizer.image_pad_id
        placed = [i for span in self.images for i in range(span.start, span.end)]
        assert placed == [i for i, token_id in enumerate(self.token_ids) if token_id == pad]
        assert all(span.end - span.start == span.image.visual_tokens for span in self.images)
        assert self.max_tokens is None or size <= self.max_tokens

    def _render(self, ask: Ask, images: Sequence[ImageInput]) -> tuple[list[int], list[ImageSpan]]:
        assert len(images) == len(ask.views), f"{len(images)} images for {len(ask.views)} views"
        ids: list[int] = []
        if self.token_ids and self.token_ids[-1] != self._tokenizer.turn_end_id:
            ids.append(self._tokenizer.turn_end_id)
        spans: list[ImageSpan] = []
        texts: list[Text] = []
        rest = iter(images)
        for part in ask.parts:
            if isinstance(part, Text):
                texts.append(part)
                continue
            assert isinstance(part, ImagePart)
            ids += self._tokenizer.encode(texts)
            texts = []
            image = next(rest)
            start = len(self) + len(ids)
            spans.append(ImageSpan(start, start + image.visual_tokens, image))
            ids += [self._tokenizer.image_pad_id] * image.visual_tokens
        return ids + self._tokenizer.encode(texts), spans
