"""`max_tokens` of a request, over all its turns: a backend that lets each request sample what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vtengine.engine.base import Backend, Completion, OnTokens, Request, RequestRejected

if TYPE_CHECKING:
    import torch

SPENT = "max_tokens_reached"
"""Code of the RequestRejected for a turn that has no token left."""


class CappedBackend:
    """One episode's view of a backend."""

    def __init__(self, backend: Backend, max_tokens: int) -> None:
        self._backend = backend
        self._left = max_tokens

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        completion = await self._backend.generate(self._capped(request), on_tokens)
        self._left -= len(completion.token_ids)
        return completion

    async def load_weights(self, source: Path | Mapping[str, torch.Tensor], version: int) -> None:
        raise NotImplementedError("weights are loaded into the backend itself")

    def stats(self) -> dict[str, float]:
        return self._backend.stats()

    async def close(self) -> None:
        """The backend behind it serves others and stays open."""

    def _capped(self, request: Request) -> Request:
        if self._left < 1:
            raise RequestRejected(SPENT, "max_tokens: none is left for another turn")
        sampling = request.sampling
        return replace(request, sampling=replace(sampling, max_new_tokens=min(sampling.max_new_tokens, self._left)))
