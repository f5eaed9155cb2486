"""What a sweep runs: a TOML file, read into frozen dataclasses. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vtengine_training.checks import at_least, not_empty


@dataclass(frozen=True)
class PlotConfig:
    """metrics: names in metrics.jsonl, one column of panels each. smooth: steps of the running mean.

    rows: a varied key; each of its values gets a row of panels. average: a varied key over which curves are averaged,
    the seed for instance, with a band from the least to the most.
    """

    metrics: tuple[str, ...] = ("upscale/ratio", "reward/accuracy", "visual_tokens/per_question")
    smooth: int = 5
    rows: str = ""
    average: str = ""

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("metrics = []: name at least one metric")
        at_least(self, 1, "smooth")


@dataclass(frozen=True)
class SweepConfig:
    """base: a configuration of `command`; its path is relative to this file. output: a folder; each run gets one in it.

    set: keys changed in every run. sweep: key = [values], the grid of all combinations. runs: single runs beside the
    grid, each a table of keys with, if wanted, a `name`. A key is written as in --set: reward.penalty.theta.
    jobs: runs at the same time, which share the GPUs. last: steps at the end over which the summary's figures
    are means. results: a JSON file beside the summary in `output`, such as benchmarks/results/NAME.json.
    """

    base: str
    output: str
    command: Literal["grpo", "sft"] = "grpo"
    jobs: int = 1
    last: int = 10
    results: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)
    runs: tuple[dict[str, Any], ...] = ()
    plot: PlotConfig = field(default_factory=PlotConfig)

    def __post_init__(self) -> None:
        not_empty(self, "base", "output")
        at_least(self, 1, "jobs", "last")
        if not self.sweep and not self.runs:
            raise ValueError("sweep: nothing is varied; give [sweep] keys with lists of values, or [[runs]]")
