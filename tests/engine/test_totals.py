"""What several engines count, as the figures of one."""

from __future__ import annotations

import asyncio

from tests.engine.processes.engines import tiny
from vtengine.engine.base import GAUGES
from vtengine.engine.totals import total


def test_counters_outlive_their_engine_and_gauges_do_not() -> None:
    living = [{"steps": 3, "running": 2, "weight_version": 5}, {"steps": 4, "running": 1, "weight_version": 4}]
    gone = [{"steps": 10, "running": 7, "weight_version": 1}]
    assert total(living, gone) == {"steps": 17.0, "running": 3.0, "weight_version": 4.0}
    assert total([], gone) == {"steps": 10.0, "running": 0.0, "weight_version": 1.0}
    assert total([]) == {"weight_version": 0.0}


def test_every_gauge_is_one_that_the_engine_has() -> None:
    engine = tiny()
    figures = engine.stats()
    asyncio.run(engine.close())
    assert figures.keys() >= GAUGES
    assert {name for name in figures if name.endswith("_bytes") or name.startswith(("pages_", "weight_"))} - GAUGES == {
        "pages_evicted"
    }
