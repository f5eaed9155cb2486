"""lm_head and sampling in one graph for each batch size and for what its rows need.

A graph reads the hidden states and the numbers of its rows where they always lie, and leaves what it samples in
`Sampled`, where the next pass finds it. Logits have no bias here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vtengine_kernels.token_sample import Truncation, token_sample

from vtengine.engine.embedded.captures import Captures, batch_sizes
from vtengine.engine.embedded.sampler import LEAST_TEMPERATURE, kind_of, seed_bits, uniforms
from vtengine.engine.embedded.upload import send

if TYPE_CHECKING:
    from vtengine.engine.base import SamplingParams
    from vtengine.engine.embedded.sampled import Sampled
    from vtengine.model import VLModel

Ways = tuple[bool, int]
"""What is in a batch: greedy rows; drawn ones, with limits (2), without (1), or none (0)."""
WAYS: tuple[Ways, ...] = ((True, 0), (False, 1), (True, 1), (False, 2), (True, 2))


@dataclass(frozen=True)
class GraphPlan:
    """Of a batch, on the host. seeds uint64 [N]; numbers float64 [N, 6]: whether the row is drawn, the draw, its
    temperature, top_k, top_p, min_p. float32 values, but for the draw, which is each step's.
    """

    seeds: np.ndarray
    numbers: np.ndarray
    ways: Ways

    @staticmethod
    def of(params: Sequence[SamplingParams], seeds: Sequence[int], vocab: int) -> GraphPlan:
        kinds = [kind_of(p) for p in params]
        rows = [
            (kind > 0, 0, max(p.temperature, LEAST_TEMPERATURE), min(p.top_k or vocab, vocab), p.top_p, p.min_p)
            for kind, p in zip(kinds, params, strict=True)
        ]
        bits = np.array([seed_bits(seed) for seed in seeds], dtype=np.uint64)
        return GraphPlan(bits, np.array(rows, dtype=np.float64), (min(kinds) == 0, max(kinds)))


class HeadGraphs:
    """N rows, at most M; H hidden; V vocabulary."""

    def __init__(self, model: VLModel, sampled: Sampled, banned: Sequence[int], captures: Captures) -> None:
        """banned: ids that no request may sample."""
        device, rows, text = model.device, sampled.max_rows, model.config.text
        self._model, self._sampled, self._captures = model, sampled, captures
        self._sizes = batch_sizes(rows)
        self._banned = torch.tensor(banned, device=device)
        self._hidden_MH = torch.zeros(rows, text.hidden_size, dtype=model.dtype, device=device)
        unlimited = torch.tensor([0, 0, 1, text.vocab_size, 1, 0], dtype=torch.float64, device=device)
        self._numbers_M = unlimited.repeat(rows, 1)  # see GraphPlan

    @torch.inference_mode()
    def capture(self) -> None:
        """The largest first: those that follow find room in its memory."""
        for size in reversed(self._sizes):
            for ways in WAYS:
                self._replay(size, ways)

    def prepare(self, plan: GraphPlan, counters: np.ndarray) -> Callable[[Tensor], None]:
        """counters uint64 [N]: how many tokens each row has sampled -> what is to be given its hidden state [N, H]."""
        if plan.ways[1]:
            numbers = plan.numbers.copy()
            numbers[:, 1] = uniforms(plan.seeds, counters)
            send(numbers, self._numbers_M[: len(numbers)])
        return partial(self._sample, plan.ways)

    def _sample(self, ways: Ways, hidden: Tensor) -> None:
        count = len(hidden)
        self._hidden_MH[:count].copy_(hidden)
        self._replay(next(size for size in self._sizes if size >= count), ways)()

    def _replay(self, size: int, ways: Ways) -> Callable[[], Tensor]:
        forward = partial(self._forward, size, *ways)
        return self._captures.of(("head", size, *ways), forward) or forward

    def _forward(self, size: int, greedy: bool, drawn: int) -> Tensor:
        """Returns the ids; those of rows that fill up are nobody's."""
        logits_NV = self._model.scores(self._hidden_MH[:size])
        logits_NV.index_fill_(1, self._banned, -torch.inf)
        is_drawn, draws, temperature, top_k, top_p, min_p = self._numbers_M[:size].unbind(1)
        found = [token_sample(logits_NV)] if greedy else []
        if drawn:
            limits = Truncation(top_k.long(), top_p.float(), min_p.float()) if drawn == 2 else None
            found.append(token_sample(logits_NV, draws, temperature.float(), limits))
        ids, logprobs = found[0]
        if greedy and drawn:
            ids, logprobs = (torch.where(is_drawn > 0, warm, cold) for cold, warm in zip(*found, strict=True))
        self._sampled.put(ids, logprobs)
        return ids
