"""Verdicts: cached, asked once for equal queries, counted; canaries tell whether the judge can be believed."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vtengine_training.rewards.judge.cache import VerdictCache, cache_key
from vtengine_training.rewards.judge.canaries import CANARIES, Canary
from vtengine_training.rewards.judge.client import Endpoint, NoVerdict
from vtengine_training.rewards.judge.config import JudgeConfig
from vtengine_training.rewards.judge.prompt import Query, build_prompt, parse_verdict

log = logging.getLogger(__name__)
UNPARSABLE_RETRIES = 1
"""A reply that is no verdict is asked for again so often, with a new fence and key."""


class Judge:
    """Connections belong to the event loop they were made in; a new loop gets new ones. `totals` only ever grow."""

    def __init__(self, config: JudgeConfig) -> None:
        config.require_model()
        self.config = config
        self.cache = VerdictCache(config.cache)
        self.totals: Counter[str] = Counter()
        self.latency_s = 0.0
        self._endpoint: Endpoint | None = None
        self._abandoned: list[Endpoint | None] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: dict[str, asyncio.Task[bool | NoVerdict]] = {}
        self._complained: set[str] = set()
        self._canaries = itertools.cycle(CANARIES)
        self._canary_tasks: set[asyncio.Task[None]] = set()

    async def verdict(self, query: Query) -> bool | None:
        """True = correct, False = incorrect, None = no verdict. Raises nothing but cancellation."""
        self.totals["asked"] += 1
        if not query.answer:
            return False
        key = cache_key(query, self.config)
        cached = self.cache.get(key)
        if cached is not None:
            self.totals["cache_hits"] += 1
            return cached
        self._bind()
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._ask_and_keep(key, query))
            self._running[key] = task
            task.add_done_callback(lambda _: self._running.pop(key, None))
        else:
            self.totals["shared"] += 1
        verdict = await asyncio.shield(task)  # one waiter's cancellation is not the others'
        if not isinstance(verdict, NoVerdict):
            return verdict
        self.totals.update(["no_verdict", f"no_verdict/{verdict.code}"])
        return None

    def start_canaries(self) -> None:
        """Sends `config.canaries` known pairs, in turn, never from the cache. Call once per step, in the loop."""
        self._bind()
        for canary in itertools.islice(self._canaries, self.config.canaries):
            task = asyncio.create_task(self._try_canary(canary))
            self._canary_tasks.add(task)
            task.add_done_callback(self._canary_tasks.discard)

    async def ask(self, query: Query) -> bool:
        """One verdict from the endpoint itself. Raises NoVerdict."""
        self._bind()
        assert self._endpoint is not None
        began_s = time.perf_counter()
        try:
            for _ in range(1 + UNPARSABLE_RETRIES):
                prompt = build_prompt(query)
                reply = await self._endpoint.complete(prompt)
                self.totals["prompt_tokens"] += reply.prompt_tokens
                self.totals["completion_tokens"] += reply.completion_tokens
                verdict = parse_verdict(reply.text, prompt.key)
                if verdict is not None:
                    return verdict
                self.totals["unparsable"] += 1
            raise NoVerdict("unparsable", f"the reply is no verdict: {reply.text[:80]!r}")
        finally:
            self.latency_s += time.perf_counter() - began_s

    @property
    def cost(self) -> float:
        """In the currency of config.price_*, over the whole run."""
        prompt = self.totals["prompt_tokens"] * self.config.price_prompt
        return (prompt + self.totals["completion_tokens"] * self.config.price_completion) / 1e6

    def figures(self) -> dict[str, float]:
        """Totals of the run by name; requests include retries and canaries."""
        found: dict[str, float] = {name: float(count) for name, count in sorted(self.totals.items())}
        return found | {"cost": self.cost, "latency_s": self.latency_s, "cache_errors": float(self.cache.errors)}

    def state(self) -> dict[str, Any]:
        return {"totals": dict(self.totals), "cache": self.config.cache, "latency_s": self.latency_s}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Counts on from `state()`, which is added. The cache is the file that the config names."""
        self.totals.update({str(name): int(count) for name, count in state["totals"].items()})
        self.latency_s += float(state["latency_s"])

    async def close(self) -> None:
        for task in (*self._running.values(), *self._canary_tasks):
            task.cancel()
        await asyncio.gather(*self._running.values(), *self._canary_tasks, return_exceptions=True)
        if self._endpoint is not None and self._loop is asyncio.get_running_loop():
            await self._endpoint.close()
        self._endpoint = None
        self.cache.close()

    def _bind(self) -> None:
        loop = asyncio.get_running_loop()
        if self._endpoint is None or loop is not self._loop:
            self._abandoned.append(self._endpoint)  # kept: its connections cannot be closed from another loop
            self._endpoint, self._loop = Endpoint(self.config), loop
            self._endpoint.counts = self.totals
            self._running.clear()
            self._canary_tasks.clear()

    async def _ask_and_keep(self, key: str, query: Query) -> bool | NoVerdict:
        try:
            verdict = await self.ask(query)
        except NoVerdict as failure:
            if failure.code not in self._complained:
                self._complained.add(failure.code)
                log.warning("judge: no verdict (%s; others are counted): %s", failure.code, failure)
            return failure
        self.cache.put(key, verdict, query, self.config.model)
        return verdict

    async def _try_canary(self, canary: Canary) -> None:
        try:
            verdict = await self.ask(canary.query)
        except NoVerdict:
            self.totals["canary_failed"] += 1
            return
        self.totals["canary_right" if verdict == canary.expected else "canary_wrong"] += 1
        if verdict != canary.expected:
            log.warning("judge: wrong on the canary %r: said %s", canary.name, verdict)
