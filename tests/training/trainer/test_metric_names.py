"""The metrics that a run logs are those of the docs."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from vtengine_training.trainer.command import train

DOCS = Path(__file__).resolve().parents[3] / "docs"
ELSEWHERE = ("rules/", "judge/", "penalty/", "reward/format/", "reward/status/", "loggers/")
ELSEWHERE += ("upscale/accuracy_", "upscale/precision", "upscale/recall", "upscale/needless")
"""Not of every run: of other rewards, of faults, of episodes with a second view."""


def documented() -> set[str]:
    """Names in the first column of the table of metrics; NAME and * stand for anything."""
    table = (DOCS / "training-grpo.md").read_text().split("## Metrics\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_metric_is_documented_and_the_reverse(run, tiny_data) -> None:
    one = run(
        steps=1,
        peak_tflops=1.0,
        loss={"kl_coef": 0.1, "entropy_coef": 0.1},
        validation={"every": 1, "files": [str(tiny_data)]},
    )
    rows: list[dict[str, float]] = []
    asyncio.run(train(one, rows.append))
    names = documented()
    patterns = [re.compile(re.escape(name).replace(r"\*", ".+").replace("NAME", ".+")) for name in names]
    logged = set(rows[-1])
    assert not {name for name in logged if not any(pattern.fullmatch(name) for pattern in patterns)}
    plain = {name for name in names if "*" not in name and "NAME" not in name}
    assert not {name for name in plain - logged if not name.startswith(ELSEWHERE)}
