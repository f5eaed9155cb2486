"""What a step learns from: sampled when it begins, or, with `rollout.ahead`, while the step before it learns."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from vtengine_training.errors import Refused
from vtengine_training.grpo.metrics import rollout_metrics
from vtengine_training.sync.daemon import in_daemon
from vtengine_training.trainer.collect import Collected, Collector

log = logging.getLogger(__name__)
T = TypeVar("T")
COUNTED = (
    *("drawn", "waves", "zero_spread", "quarantined", "failed", "reward_failed", "reused", "stale", "surplus", "used"),
)


@dataclass(frozen=True, eq=False)
class Sampled:
    """What a step learns from. figures: the metrics that say how it was sampled and rewarded, of all ranks."""

    collected: Collected
    figures: dict[str, float]


class Rollouts:
    """`waiting`: those of the next step, if they were sampled ahead; part of a checkpoint.

    They were sampled with the weights that the last step began with, and after `take` nothing is: between steps no
    engine generates, so that weights can be published and a checkpoint holds all there is.
    """

    def __init__(self, collector: Collector, dump_every: int) -> None:
        self.collector, self.dump_every = collector, dump_every
        self.waiting: Sampled | None = None
        self._refusal: Refused | None = None

    async def take(self, step: int) -> Sampled:
        """Those of step `step`, now if they do not wait. Raises Refused, see `Collector.collect`."""
        if self._refusal is not None:
            raise self._refusal
        found, self.waiting = self.waiting or await self._sample(step), None
        return found

    async def ahead(self, step: int, learn: Callable[[], T]) -> T:
        """learn(), in a thread, while step `step` is sampled; returns when both are done.

        A fault of one does not end the other: other ranks may be at a meeting that this one still has to come to. A
        refusal, which all ranks have alike, is raised by the next `take`, so that what was learned meanwhile counts. An
        interrupt leaves the thread to itself.
        """
        drawn = self.collector.sampler.drawn
        sampled, learned = await asyncio.gather(self._sample(step), in_daemon(learn), return_exceptions=True)
        if isinstance(learned, BaseException):
            if isinstance(sampled, BaseException):
                log.error("the learner failed too: %s: %s", type(learned).__name__, learned)
                raise sampled
            raise learned
        if isinstance(sampled, Refused):
            self._refusal, self.collector.sampler.drawn = sampled, drawn
        elif isinstance(sampled, BaseException):
            raise sampled
        else:
            self.waiting = sampled
        return learned

    async def _sample(self, step: int) -> Sampled:
        collector, began = self.collector, time.perf_counter()
        collected = await collector.collect(step, bool(self.dump_every) and step % self.dump_every == 0)
        figures = {
            "epoch": float(collector.sampler.epoch),
            "data/quarantined": float(len(collector.sampler.quarantined)),
        }
        figures |= rollout_metrics(collected.facts)
        figures |= {f"groups/{name}": float(collected.counts[name]) for name in COUNTED}
        if collected.facts:
            figures["groups/zero_spread_ratio"] = collected.counts["zero_spread"] / len(collected.facts)
        figures |= collector.rewarder.end_step(figures, collector.ranks.total)
        return Sampled(collected, figures | {"time/rollout": time.perf_counter() - began})
