"""Makes a fixed share of the first replies ask for the high view, whatever the model would rather do.

How often a checkpoint asks is a matter of its training; what a second turn costs is a matter of the engine. So, where
speed is measured, the first replies about every other picture are begun for the model, up to the opening of the call,
and the model goes on from there. Every engine gets the same beginnings, and the choice depends on the pixels alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vtengine.engine.base import Backend, Completion, OnTokens, Request
from vtengine.protocol.profile import Profile
from vtengine.protocol.tools import RESIZE_CALL
from vtengine.rollout.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

THINK = "I look."


class AskingBackend:
    """A backend around another one. `one_in`: of how many pictures one is asked about twice."""

    def __init__(self, inner: Backend, tokenizer: Tokenizer, profile: Profile, one_in: int = 2) -> None:
        opening = profile.reply_call(THINK, RESIZE_CALL).partition("{")[0]
        self.inner, self.one_in = inner, one_in
        self.beginning = tuple(tokenizer.encode_untrusted(opening))

    def is_begun(self, request: Request) -> bool:
        return len(request.images) == 1 and int(request.images[0].content_hash[:8], 16) % self.one_in == 0

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        begun = self._begun(request)
        if begun is None:
            return await self.inner.generate(request, on_tokens)
        if on_tokens is not None:
            on_tokens(self.beginning)
        return self._whole(request, await self.inner.generate(begun, on_tokens))

    def _begun(self, request: Request) -> Request | None:
        return replace(request, token_ids=request.token_ids + self.beginning) if self.is_begun(request) else None

    def _whole(self, request: Request, completion: Completion) -> Completion:
        """The account is that of the request as it came: the beginning counts as reply, not as prompt."""
        return replace(
            completion,
            token_ids=self.beginning + completion.token_ids,
            logprobs=(0.0,) * len(self.beginning) + completion.logprobs,
            prompt_tokens=len(request.token_ids),
            cached_tokens=min(completion.cached_tokens, len(request.token_ids)),
        )

    async def load_weights(self, source: Path | Mapping[str, torch.Tensor], version: int) -> None:
        await self.inner.load_weights(source, version)

    def stats(self) -> dict[str, float]:
        return self.inner.stats()

    async def close(self) -> None:
        await self.inner.close()
