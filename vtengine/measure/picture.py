"""Latency over throughput, a line for each resolution. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ENDINGS = (".svg", ".png", ".pdf")
COLOURS = ("#2a6f97", "#e09f3e")
LINES = {"p50": "-", "p99": ":"}


def check_picture(path: Path) -> None:
    """Raises ValueError where `draw` could not."""
    if path.suffix not in ENDINGS:
        raise ValueError(f"its name ends in {path.suffix or 'nothing'}; use one of {', '.join(ENDINGS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is missing; pip install matplotlib")


def draw(levels: Sequence[Mapping[str, Any]], path: Path) -> None:
    """levels: as `figures` makes them. Those that nobody answered have no point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    views = dict.fromkeys(level["resolution"] for level in levels)
    for view, colour in zip(views, COLOURS, strict=False):
        for name, line in LINES.items():
            axes.plot([], [], line, color=colour, label=f"{view}, {name}")
        for loop, marker in (("concurrency", "o"), ("rate_per_s", "s")):
            shown = [one for one in levels if one["resolution"] == view and one[loop] and one["latency_ms"]]
            rates = [level["questions_per_s"] for level in shown]
            for name, line in LINES.items():
                times = [level["latency_ms"][name] / 1e3 for level in shown]
                axes.plot(rates, times, marker + line, color=colour)
            for level, rate in zip(shown, rates, strict=True):
                place = (rate, level["latency_ms"]["p50"] / 1e3)
                word = f"{level[loop]:g}" + ("/s" if loop == "rate_per_s" else "")
                axes.annotate(word, place, textcoords="offset points", xytext=(4, -10), fontsize=7, color=colour)
    axes.set(xlabel="questions per second", ylabel="seconds to the answer", xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
