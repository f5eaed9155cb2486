"""Figures for Prometheus: requests, episodes, tokens, times, and whatever backend and image pipeline count."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vtengine.engine.base import GAUGES
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
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("requests", "HTTP requests answered", ("route", "status"))
        self.cancelled = self._counter("requests_cancelled", "Requests whose client left first")
        self.episodes = _EpisodeTotals()
        self.registry.register(self.episodes)
        self.request_seconds = Histogram(
            "vtengine_request_seconds", "From the request to the end of the reply", ("route",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.ttft_seconds = Histogram(
            "vtengine_time_to_first_token_seconds", "Of each turn, from its submission", ("turn",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._requests_with, self._seconds_on = cache(self.requests.labels), cache(self.request_seconds.labels)
        self._ttft = [self.ttft_seconds.labels(turn) for turn in "123"]
        self._gauge("requests_running", "Episodes at work", lambda: gate.running_now)
        self._gauge("requests_waiting", "Episodes that wait for a place", lambda: gate.waiting)
        self.registry.register(_StatsCollector(sources))

    def count(self, episode: Episode) -> None:
        """Adds a finished episode."""
        self.episodes.add(episode)
        for index, turn in enumerate(episode.turns):
            self._ttft[min(index, 2)].observe(turn.completion.ttft_s)

    def note(self, route: str, status: int, seconds: float) -> None:
        """Adds a finished request."""
        self._requests_with(route, str(status)).inc()
        self._seconds_on(route).observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> prometheus_client.Counter:
        return prometheus_client.Counter(f"vtengine_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(f"vtengine_{name}", text, registry=self.registry).set_function(read)


_TOTALS = {
    "episodes": ("Episodes by how they ended", "status"),
    "episodes_upscaled": ("Episodes that were shown a closer view", None),
    "turns": ("Replies of the model", None),
    "prompt_tokens": ("Prompt tokens, by where they came from", "source"),
    "completion_tokens": ("Tokens written by the model", None),
    "visual_tokens": ("Visual tokens shown", None),
    "visual_tokens_full": ("Visual tokens that high views would have had", None),
}
"""name -> what it counts, and what its label says where it has one."""


class _EpisodeTotals(Collector):
    """Sums over all episodes, made into samples at a scrape only: each of its counters would lock for every episode.

    One event loop only.
    """

    def __init__(self) -> None:
        known = [("prompt_tokens", "cache"), ("prompt_tokens", "prefill")]
        known += [(name, "") for name, (_, label) in _TOTALS.items() if label is None]
        self._totals = Counter(dict.fromkeys(known, 0))

    def add(self, episode: Episode) -> None:
        totals = self._totals
        done = [turn.completion for turn in episode.turns]
        totals["episodes", episode.status] += 1
        totals["episodes_upscaled", ""] += episode.is_upscaled
        totals["turns", ""] += len(done)
        totals["visual_tokens", ""] += episode.visual_tokens
        totals["visual_tokens_full", ""] += episode.visual_tokens_full
        for one in done:
            totals["prompt_tokens", "cache"] += one.cached_tokens
            totals["prompt_tokens", "prefill"] += one.prefill_tokens
            totals["completion_tokens", ""] += len(one.token_ids)

    def collect(self) -> Iterable[CounterMetricFamily]:
        totals = list(self._totals.items())
        for name, (text, label) in _TOTALS.items():
            family = CounterMetricFamily(f"vtengine_{name}", text, labels=() if label is None else (label,))
            for (of, value), total in totals:
                if of == name:
                    family.add_metric([value] if label else [], total)
            yield family


_GAUGES = GAUGES | {"engines", "engines_down", "servers", "servers_down", "cache_bytes"}
_NAMES = {"pages_total": "pages", "cpu_s": "cpu_seconds"}
"""Where `_total` would say that a gauge counts, and where Prometheus writes a unit out."""


class _StatsCollector(Collector):
    """Figures kept elsewhere: counters vtengine_<prefix>_<name>_total, and gauges without the ending. A name that has
    the prefix does not get it again."""

    def __init__(self, sources: Mapping[str, Stats]) -> None:
        self._sources = sources

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        for prefix, stats in self._sources.items():
            for name, value in stats().items():
                kind = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
                full = _ODD.sub("_", _NAMES.get(name, name))
                full = full if full.startswith(prefix) else f"{prefix}_{full}"
                yield kind(f"vtengine_{full}", f"{name} of the {prefix}", value=value)
