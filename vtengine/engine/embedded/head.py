"""From hidden states to sampled tokens: lm_head and sampling for the rows of any pass.

Where there are captures, a pass in which no row has a bias goes through a graph; others are sampled step by step, by
`sampler`. N rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vtengine.engine.base import SamplingParams
from vtengine.engine.embedded.head_graphs import GraphPlan, HeadGraphs
from vtengine.engine.embedded.sampler import SamplingPlan, sample

if TYPE_CHECKING:
    from vtengine.engine.embedded.captures import Captures
    from vtengine.engine.embedded.sampled import Sampled
    from vtengine.engine.embedded.sequence import Sequence
    from vtengine.model import VLModel

Sample = Callable[[Tensor], None]
"""Is given the hidden states [N, H] of the rows that sample; what they sample is in `Sampled` then."""


class Head:
    """captures None: there are no graphs."""

    def __init__(self, model: VLModel, sampled: Sampled, captures: Captures | None) -> None:
        self._model, self._sampled = model, sampled
        self._banned = [model.config.image_token_id, model.config.video_token_id]
        self._graphs = None if captures is None else HeadGraphs(model, sampled, self._banned, captures)
        self._plan: tuple[tuple[int, ...], SamplingPlan | GraphPlan] | None = None

    def capture(self) -> None:
        if self._graphs is not None:
            self._graphs.capture()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Samples in every way without graphs, so that no request waits for a kernel to be compiled."""
        ways = (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.9, top_k=9))
        plan = self._build(ways, [0, 1, 2])
        hidden = torch.zeros(3, self._model.config.text.hidden_size, dtype=self._model.dtype, device=self._model.device)
        sample(self._model.scores(hidden), plan, plan.draws(np.zeros(3, dtype=np.uint64)))

    def prepare(self, sequences: list[Sequence]) -> Sample:
        """To be called before the pass in which these sequences sample: what it sends then waits for no pass."""
        key = tuple(s.arrival for s in sequences)
        if self._plan is None or self._plan[0] != key:
            params, seeds = [s.request.sampling for s in sequences], [s.seed for s in sequences]
            if self._graphs is None or any(p.logit_bias for p in params):
                self._plan = key, self._build(params, seeds)
            else:
                self._plan = key, GraphPlan.of(params, seeds, self._model.config.text.vocab_size)
        plan, counters = self._plan[1], np.array([s.num_outputs for s in sequences], dtype=np.uint64)
        if isinstance(plan, GraphPlan):
            assert self._graphs is not None
            return self._graphs.prepare(plan, counters)
        return partial(self._sample, plan, plan.draws(counters))

    def forget(self) -> None:
        """What it knows of sequences."""
        self._plan = None

    def _build(self, params: list[SamplingParams] | tuple[SamplingParams, ...], seeds: list[int]) -> SamplingPlan:
        return SamplingPlan.build(params, seeds, self._banned, self._model.config.text.vocab_size, self._model.device)

    def _sample(self, plan: SamplingPlan, draws: Tensor | None, hidden: Tensor) -> None:
        self._sampled.put(*sample(self._model.scores(hidden), plan, draws))
