"""Figures for Prometheus: requests, episodes, tokens, times, and whatever backend and image pipeline count."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from vtengine.rollout.episode import Episode
from vtengine.server.admission import Gate

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Stats = Callable[[], Mapping[str, float]]
_ODD = re.compile(r"[^a-zA-Z0-9_]")


class Metrics:
    """One registry per application, so that several can live in one process."""

    def __init__(self, gate: Gate, sources: Mapping[str, Stats]) -> None:
        """sources: prefix -> flat figures, read at every scrape (such as engine -> backend.stats)."""
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP requests answered", ("route", "status"))
        self.cancelled = self._counter("requests_cancelled", "Requests whose client left first")
        self.episodes = self._counter("episodes", "Episodes by how they ended", ("status",))
        self.upscaled = self._counter("episodes_upscaled", "Episodes that were shown a closer view")
        self.turns = self._counter("turns", "Replies of the model")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, by where they came from", ("source",))
        self.completion_tokens = self._counter("completion_tokens", "Tokens written by the model")
        self.visual_tokens = self._counter("visual_tokens", "Visual tokens shown")
        self.visual_tokens_full = self._counter("visual_tokens_full", "Visual tokens that high views would have had")
        self.request_seconds = Histogram(
            "vtengine_request_seconds", "From the request to the end of the reply", ("route",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.ttft_seconds = Histogram(
            "vtengine_time_to_first_token_seconds", "Of each turn, from its submission", ("turn",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._requests_with, self._seconds_on = cache(self.requests.labels), cache(self.request_seconds.labels)
        self._cached_tokens, self._prefill_tokens = map(self.prompt_tokens.labels, ("cache", "prefill"))
        self._ttft = [self.ttft_seconds.labels(turn) for turn in "123"]
        self._gauge("requests_running", "Episodes at work", lambda: gate.running_now)
        self._gauge("requests_waiting", "Episodes that wait for a place", lambda: gate.waiting)
        self.registry.register(_StatsCollector(sources))

    def count(self, episode: Episode) -> None:
        """Adds a finished episode."""
        self.episodes.labels(episode.status).inc()
        self.upscaled.inc(episode.is_upscaled)
        done = [turn.completion for turn in episode.turns]
        self.turns.inc(len(done))
        self.visual_tokens.inc(episode.visual_tokens)
        self.visual_tokens_full.inc(episode.visual_tokens_full)
        self._cached_tokens.inc(sum(one.cached_tokens for one in done))
        self._prefill_tokens.inc(sum(one.prefill_tokens for one in done))
        self.completion_tokens.inc(sum(len(one.token_ids) for one in done))
        for index, one in enumerate(done):
            self._ttft[min(index, 2)].observe(one.ttft_s)

    def note(self, route: str, status: int, seconds: float) -> None:
        """Adds a finished request."""
        self._requests_with(route, str(status)).inc()
        self._seconds_on(route).observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"vtengine_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(f"vtengine_{name}", text, registry=self.registry).set_function(read)


class _StatsCollector(Collector):
    """Figures kept elsewhere, as gauges named vtengine_<prefix>_<name>."""

    def __init__(self, sources: Mapping[str, Stats]) -> None:
        self._sources = sources

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for prefix, stats in self._sources.items():
            for name, value in stats().items():
                full = f"vtengine_{prefix}_{_ODD.sub('_', name)}"
                yield GaugeMetricFamily(full, f"{name} of the {prefix}", value=value)
