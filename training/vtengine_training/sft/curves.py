"""The curves of a run, drawn from its metrics file. Needs matplotlib."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = (
    ("dense labels: share right", ("char", "key", "slot", "object")),
    ("loss", ("dense_loss", "language_loss")),
    ("validation: answers right", ("high/all", "two/all", "low/enough", "low/needs_high", "format")),
)
SMOOTHING = 5


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, the last one of each step where a resumed run repeated steps."""
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["step"], "validation" in row] = row
    return [rows[key] for key in sorted(rows)]


def plot_curves(metrics: Path, image: Path) -> None:
    """Writes a PNG (or SVG, by the name) with three panels. Raises ValueError when matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("curves: matplotlib is missing; pip install 'vtengine[train]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(metrics)
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    borders = [b["step"] for a, b in itertools.pairwise(rows) if a["phase"] != b["phase"]]
    for axis, (title, names) in zip(axes, PANELS, strict=True):
        for name in names:
            points = [(row["step"], value) for row in rows if (value := (row.get("validation") or row).get(name))]
            if points:
                steps, values = zip(*points, strict=True)
                axis.plot(steps, _smooth(values) if "share" in title or title == "loss" else values, label=name)
        for border in borders:
            axis.axvline(border, color="grey", lw=0.5, ls=":")
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_yscale("log" if title == "loss" else "linear")
        axis.grid(alpha=0.3)
        axis.legend()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=90)
    pyplot.close(figure)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over the last few values at each point."""
    return [sum(values[max(0, i - SMOOTHING + 1) : i + 1]) / min(i + 1, SMOOTHING) for i in range(len(values))]
