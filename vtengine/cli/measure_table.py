"""The table of `vtengine measure`: a line for each level of load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]


def print_levels(levels: Sequence[Figures]) -> None:
    """Columns that no level has anything for are left out."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from vtengine.cli.tables import print_table

    lines = [_cells(level) for level in levels]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    names = [name for name in lines[0] if any(line[name] for line in lines)]
    for name in names:
        table.add_column(name, no_wrap=True, justify="left" if name in ("load", "resolution") else "right")
    for line in lines:
        table.add_row(*(line[name] for name in names))
    print_table(table, 160)
    print("times in ms, of half of the questions / of 99 of 100; first token: since its turn was sent")


def _cells(level: Figures) -> dict[str, str]:
    asked = level["questions"] or 1
    rate, ratio, accuracy = level["rate_per_s"], level["upscale_ratio"], level["accuracy"]
    return {
        "load": f"{level['concurrency']} at a time" if rate is None else f"{rate:g}/s",
        "resolution": level["resolution"],
        "questions/s": f"{level['questions_per_s']:.3g}",
        "tokens/s": f"{level['tokens_per_s']:,.0f}",
        "latency": _percentiles(level["latency_ms"]),
        "first token": _percentiles(level["first_token_ms"]),
        "of turn 2": _percentiles(level["first_token_turn2_ms"]),
        "per token": _percentiles(level["per_token_ms"]),
        "looked again": "" if ratio is None else f"{ratio:.0%}",
        "visual tokens": f"{level['visual_tokens'] / asked:.0f}" if level["visual_tokens"] else "",
        "prefilled": f"{level['prefill_tokens'] / asked:.0f}",
        "right": "" if accuracy is None else f"{accuracy:.1%}",
    }


def _percentiles(times: Mapping[str, float] | None) -> str:
    if times is None:
        return ""
    return " / ".join(f"{ms:.3g}" if ms < 1000 else f"{ms:,.0f}" for ms in (times["p50"], times["p99"]))
