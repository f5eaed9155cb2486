"""The curves of a sweep: a column of panels per metric. Needs matplotlib."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtengine_training.sweep.config import PlotConfig
from vtengine_training.sweep.plan import Planned, name_of
from vtengine_training.sweep.summary import Curve, Row, curve, read_rows

ANY = object()
"""The value of a key that a run does not have: it is drawn in every row of panels, dashed."""


@dataclass(frozen=True)
class Line:
    """Runs that differ only in what is averaged over."""

    label: str
    row: Any
    runs: tuple[list[Row], ...]


def lines(planned: Sequence[Planned], config: PlotConfig) -> list[Line]:
    """What is drawn, in order of the runs; those without metrics are left out."""
    keys = list(dict.fromkeys(key for one in planned for key in one.settings))
    for name, key in (("rows", config.rows), ("average", config.average)):
        if key and key not in keys:
            raise ValueError(f"plot.{name} = {key!r}: is not varied; varied are {', '.join(keys)}")
    grouped: dict[tuple[str, Any], list[list[Row]]] = defaultdict(list)
    shown = [_without(one.settings, config.rows, config.average) for one in planned]
    for one, settings in zip(planned, shown, strict=True):
        row = one.settings.get(config.rows, ANY)
        has_siblings = not config.rows and shown.count(settings) > 1
        label = name_of(settings, keys) if settings and (row is not ANY or has_siblings) else one.name
        if rows := read_rows(one.folder):
            grouped[label, row].append(rows)
    return [Line(label, row, tuple(runs)) for (label, row), runs in grouped.items()]


def _without(settings: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def plot(planned: Sequence[Planned], config: PlotConfig, image: Path) -> None:
    """Writes PNG or SVG, by the name. Raises ValueError when matplotlib is missing or nothing has run."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plot: matplotlib is missing; pip install 'vtengine[train]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = lines(planned, config)
    if not drawn:
        raise ValueError("plot: no run has metrics yet")
    values = list(dict.fromkeys(line.row for line in drawn if line.row is not ANY)) or [ANY]
    size = (4.5 * len(config.metrics), 3.4 * len(values))
    figure, axes = pyplot.subplots(len(values), len(config.metrics), figsize=size, squeeze=False, layout="constrained")
    labels = list(dict.fromkeys(line.label for line in drawn))
    for value, panels in zip(values, axes, strict=True):
        for metric, axis in zip(config.metrics, panels, strict=True):
            for line in drawn:
                if line.row is ANY or line.row == value:
                    dashed = line.row is ANY and value is not ANY
                    _draw(axis, line, metric, config, labels.index(line.label), dashed)
            axis.set_title(metric if value is ANY else f"{metric}, {config.rows.rpartition('.')[2]} = {value}")
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
    found = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(found.values()), list(found), fontsize="small", loc="outside right upper")
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=90)
    pyplot.close(figure)


def _draw(axis: Any, line: Line, metric: str, config: PlotConfig, place: int, dashed: bool) -> None:
    curves = [smoothed(found, config.smooth) for rows in line.runs if (found := curve(rows, metric))]
    if not curves:
        return
    mean, low, high = spread(curves)
    steps = [step for step, _ in mean]
    style = {"color": f"C{place % 10}", "ls": "--" if dashed else "-"}
    axis.plot(steps, [value for _, value in mean], label=line.label, **style)
    if len(curves) > 1:
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.2, lw=0)


def smoothed(points: Curve, steps: int) -> Curve:
    """The mean over the last few points at each point."""
    values = [value for _, value in points]
    means = [math.fsum(values[max(0, i - steps + 1) : i + 1]) / min(i + 1, steps) for i in range(len(values))]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def spread(curves: Sequence[Curve]) -> tuple[Curve, list[float], list[float]]:
    """Mean, least and most over the curves, at the steps that all of them have."""
    by_step = [dict(points) for points in curves]
    common = [step for step, _ in curves[0] if all(step in points for points in by_step)]
    values = [[points[step] for points in by_step] for step in common]
    mean = [(step, math.fsum(row) / len(row)) for step, row in zip(common, values, strict=True)]
    return mean, [min(row) for row in values], [max(row) for row in values]
