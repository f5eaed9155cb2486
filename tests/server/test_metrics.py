"""What Prometheus is told: what only grows is a counter, what is now a gauge, by names that say so."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.engine.processes.engines import tiny
from vtengine.engine.processes import DataParallel
from vtengine.engine.sglang.fleet import SglangFleet
from vtengine.server.admission import Gate
from vtengine.server.config import ServerLimits
from vtengine.server.metrics import Metrics
from vtengine.vision.pipeline import ImagePipeline


def gauges(prefix: str, figures: Mapping[str, float]) -> set[str]:
    """The names of the figures that a scraper takes for gauges; all others are counters to it, by their names too."""
    text = Metrics(Gate(ServerLimits()), {prefix: lambda: figures}).render().decode()
    ours, stem = f"vtengine_{prefix}", prefix.removesuffix("s")
    found = {one.name: one for one in text_string_to_metric_families(text) if one.name.startswith(ours)}
    assert len(found) == len(figures)
    for name, family in found.items():
        assert family.type in ("counter", "gauge") and not re.search(f"_{stem}s?_{stem}", name)
        assert [sample.name for sample in family.samples] == [name + ("_total" if family.type == "counter" else "")]
        assert f"# TYPE {family.samples[0].name} {family.type}\n" in text and not name.endswith("_total")
    return {name.removeprefix("vtengine_") for name, family in found.items() if family.type == "gauge"}


@dataclass(eq=False)
class Engine:
    """One of several."""

    where: str
    is_lost: bool = False
    version: int = 0
    figures: dict[str, float] = field(default_factory=lambda: {"requests": 2.0, "running": 1.0})

    def stats(self) -> dict[str, float]:
        return self.figures


def test_figures_of_an_engine() -> None:
    engine = tiny()
    figures = engine.stats()
    asyncio.run(engine.close())
    now = {"running", "waiting", "pages", "pages_in_use", "pages_cached", "vision_cache_bytes", "weight_version"}
    assert gauges("engine", figures) == {f"engine_{name}" for name in now} and len(figures) > len(now)


def test_figures_of_several_engines_and_servers() -> None:
    one: Any = Engine("a")
    several = DataParallel(lambda index: one, 2, -1).stats()
    assert gauges("engine", several) == {"engine_running", "engines", "engines_down", "engine_weight_version"}
    servers = SglangFleet([one]).stats()
    now = {"running", "servers", "servers_down", "weight_version"}
    assert gauges("engine", servers) == {f"engine_{name}" for name in now}
    assert {"requests", "engine_restarts"} <= several.keys() and "failovers" in servers


def test_figures_of_the_image_pipeline() -> None:
    with ImagePipeline() as pipeline:
        assert gauges("images", pipeline.stats()) == {"images_cache_bytes"}


def test_time_has_its_unit_in_the_name_and_the_process_tells_its_memory() -> None:
    text = Metrics(Gate(ServerLimits()), {"engine": lambda: {"cpu_s": 1.5}}).render().decode()
    assert "\nvtengine_engine_cpu_seconds_total 1.5\n" in text
    assert "\nprocess_resident_memory_bytes " in text and "\nprocess_open_fds " in text
