"""What a pass has sampled: on the device, where the next pass finds its tokens, until the host asks for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class Sampled:
    """The ids and logprobs of the last pass, row by row, in memory that captured graphs may hold the address of.

    A pass may take a token from it that the host does not know: `of(place)` stands among token ids for that in row
    `place`. What a pass samples overwrites what the one before it did: `fetch` first.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.device = device
        self.max_rows = max_rows
        self._numbers = torch.zeros((max_rows, 2), dtype=torch.int64, device=device)
        self._ids, self._logprobs = self._numbers[:, 0], self._numbers.view(torch.float64)[:, 1]

    @staticmethod
    def of(place: int) -> int:
        return -1 - place

    def put(self, ids: Tensor, logprobs: Tensor) -> None:
        """ids int64 [n], logprobs float32 [n]."""
        self._ids[: len(ids)].copy_(ids)
        self._logprobs[: len(ids)].copy_(logprobs)

    def known(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T] with every `of(place)` replaced by the id that it stands for."""
        found = self._ids.index_select(0, (-1 - token_ids).clamp_(min=0))
        return torch.where(token_ids < 0, found, token_ids)

    def fetch(self, count: int) -> Fetched:
        """A copy of the first rows, in the order of the current stream; the host does not wait for it."""
        on_cuda = self.device.type == "cuda"
        numbers = torch.empty((count, 2), dtype=torch.int64, pin_memory=on_cuda)
        numbers.copy_(self._numbers[:count], non_blocking=True)
        done = torch.cuda.Event() if on_cuda else None
        if done is not None:
            done.record()
        return Fetched(numbers, done)


@dataclass(frozen=True)
class Fetched:
    """On its way to main memory. _numbers: int64 [n, 2], the ids and the bits of the logprobs as float64."""

    _numbers: Tensor
    _done: torch.cuda.Event | None

    def wait(self) -> tuple[list[int], list[float]]:
        """ids and logprobs."""
        if self._done is not None:
            self._done.synchronize()
        numbers = self._numbers.numpy()
        return numbers[:, 0].tolist(), numbers.view(np.float64)[:, 1].tolist()
