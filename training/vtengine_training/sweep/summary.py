"""The figures of a sweep, from the metrics of its runs, in the form of a benchmark result."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtengine.config import did_you_mean
from vtengine_training.sweep.config import SweepConfig
from vtengine_training.sweep.plan import Planned, short

Row = dict[str, Any]
Curve = list[tuple[int, float]]
DIGITS = 5
EXTRA = ("time/step", "memory/peak_gib")  # medians: a step beside which the machine did something else says nothing


def read_rows(folder: Path) -> list[Row]:
    """The steps of a run, in order; of a repeated one the last row. Broken lines are left out."""
    rows: dict[int, Row] = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            continue
    return [rows[step] for step in sorted(rows)]


def curve(rows: Sequence[Row], metric: str) -> Curve:
    """(step, value) where the metric has one."""
    return [(row["step"], row[metric]) for row in rows if isinstance(row.get(metric), int | float)]


def absent_metrics(config: SweepConfig, planned: Sequence[Planned]) -> list[str]:
    """A line for each of plot.metrics that no run has, with the nearest one that some run has. Nothing before a run has
    any: which there will be depends on rewards, data and settings."""
    rows = [row for one in planned for row in read_rows(one.folder)]
    names = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
    return [
        f"plot.metrics: no run has {metric!r}; "
        + (did_you_mean(metric, sorted(names)) or f"they have {', '.join(sorted(names))}")
        for metric in config.plot.metrics
        if names and metric not in names
    ]


def summary(config: SweepConfig, planned: Sequence[Planned], ended: Mapping[str, int]) -> Row:
    """Per run: what was varied, its state, the mean of each metric over its last steps, and the curves.

    ended: exit statuses by name; a run without one was not started.
    """
    from vtengine.stamp import stamp

    name = Path(config.results or config.output).stem
    keys = list(dict.fromkeys(key for one in planned for key in one.settings))
    titles = {key: short(key, keys) for key in keys}
    rows = [_row(config, one, ended.get(one.name), titles) for one in planned]
    columns = {"run": "Run", **{title: title for title in titles.values()}, "steps": "Steps"}
    columns |= {metric: metric for metric in (*config.plot.metrics, *EXTRA)}
    return {
        "suite": name,
        "stamp": stamp(Path(__file__).parent),
        "quick": False,
        "tables": {f"{name}-last": {"columns": columns}},
        "last": config.last,
        "rows": rows,
    }


def _row(config: SweepConfig, one: Planned, status: int | None, titles: Mapping[str, str]) -> Row:
    rows = read_rows(one.folder)
    state = {None: "not run", 0: "done"}.get(status, f"ended with status {status}")
    found: Row = {"run": one.name, "state": state, "steps": max((row["step"] for row in rows), default=0)}
    found |= {titles[key]: value for key, value in one.settings.items()}
    for metric in (*config.plot.metrics, *EXTRA):
        values = [value for _, value in curve(rows, metric)][-config.last :]
        average = statistics.median if metric in EXTRA else statistics.fmean
        found[metric] = round(average(values), DIGITS) if values else None
    found["curves"] = {
        metric: [[step, round(value, DIGITS)] for step, value in curve(rows, metric)] for metric in config.plot.metrics
    }
    return found
