"""lm_head and sampling in one graph for each batch size: rows that are greedy or have a temperature, and nothing else.

A graph reads the hidden states and the numbers of its rows where they always lie, and leaves what it samples in
`Sampled`, where the next pass finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vtengine_kernels.token_sample import token_sample

from vtengine.engine.embedded.captures import Captures, batch_sizes
from vtengine.engine.embedded.sampler import LEAST_TEMPERATURE, seed_bits, uniforms
from vtengine.engine.embedded.upload import send

if TYPE_CHECKING:
    from vtengine.engine.base import SamplingParams
    from vtengine.engine.embedded.sampled import Sampled
    from vtengine.model import VLModel


@dataclass(frozen=True)
class PlainPlan:
    """Of a batch, on the host: seeds uint64 [N], temperatures float32 [N], 0 for greedy rows."""

    seeds: np.ndarray
    temperatures: np.ndarray

    @staticmethod
    def of(params: Sequence[SamplingParams], seeds: Sequence[int]) -> PlainPlan:
        """params: `sampler.is_plain`, all of them."""
        temperatures = [p.temperature and max(p.temperature, LEAST_TEMPERATURE) for p in params]
        bits = [seed_bits(seed) for seed in seeds]
        return PlainPlan(np.array(bits, dtype=np.uint64), np.array(temperatures, dtype=np.float32))


class HeadGraphs:
    """N rows, at most M; H hidden; V vocabulary."""

    def __init__(self, model: VLModel, sampled: Sampled, banned: Sequence[int], captures: Captures) -> None:
        """banned: ids that no request may sample."""
        device, rows = model.device, sampled.max_rows
        self._model, self._sampled, self._captures = model, sampled, captures
        self._sizes = batch_sizes(rows)
        self._banned = torch.tensor(banned, device=device)
        self._hidden_MH = torch.zeros(rows, model.config.text.hidden_size, dtype=model.dtype, device=device)
        self._numbers_M = torch.zeros(rows, 2, dtype=torch.float64, device=device)  # the draw and the temperature

    @torch.inference_mode()
    def capture(self) -> None:
        """The largest first: those that follow find room in its memory."""
        for size in reversed(self._sizes):
            for greedy, drawn in ((True, False), (False, True), (True, True)):
                self._replay(size, greedy, drawn)

    def prepare(self, plan: PlainPlan, counters: np.ndarray) -> Callable[[Tensor], None]:
        """counters uint64 [N]: how many tokens each row has sampled -> what is to be given its hidden state [N, H]."""
        are_drawn = plan.temperatures > 0
        if are_drawn.any():
            numbers = np.stack([uniforms(plan.seeds, counters), plan.temperatures], axis=1)
            send(numbers, self._numbers_M[: len(numbers)])
        return partial(self._sample, bool((~are_drawn).any()), bool(are_drawn.any()))

    def _sample(self, greedy: bool, drawn: bool, hidden: Tensor) -> None:
        count = len(hidden)
        self._hidden_MH[:count].copy_(hidden)
        self._replay(next(size for size in self._sizes if size >= count), greedy, drawn)()

    def _replay(self, size: int, greedy: bool, drawn: bool) -> Callable[[], Tensor]:
        forward = partial(self._forward, size, greedy, drawn)
        return self._captures.of(("head", size, greedy, drawn), forward) or forward

    def _forward(self, size: int, greedy: bool, drawn: bool) -> Tensor:
        """greedy, drawn: whether such rows are among them. Returns the ids; those of rows that fill up are nobody's."""
        logits_NV = self._model.scores(self._hidden_MH[:size])
        logits_NV.index_fill_(1, self._banned, -torch.inf)
        draws, temperatures = self._numbers_M[:size].unbind(1)
        found = [token_sample(logits_NV)] if greedy else []
        if drawn:
            found.append(token_sample(logits_NV, draws, temperatures.float().clamp_(min=LEAST_TEMPERATURE)))
        ids, logprobs = found[0]
        if greedy and drawn:
            ids, logprobs = (torch.where(temperatures > 0, warm, cold) for cold, warm in zip(*found, strict=True))
        self._sampled.put(ids, logprobs)
        return ids
