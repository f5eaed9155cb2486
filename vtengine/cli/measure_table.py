"""The table of `vtengine measure`: a line for each level of load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]
LINE = ("load", "resolution")
"""Columns that say which level a line is of."""
WIDTH = 160
"""Of what is no terminal, in characters."""
GAP = 3  # between two columns


def print_levels(levels: Sequence[Figures]) -> None:
    """Columns that no level has anything for are left out; those that do not fit beside the others stand below."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from vtengine.cli.tables import print_table

    lines = [_cells(level) for level in levels]
    widths = {name: max(len(name), *(len(line[name]) for line in lines)) for name in lines[0]}
    console = Console()
    for names in _blocks(
        {name: width for name, width in widths.items() if any(line[name] for line in lines)},
        console.width if console.is_terminal else WIDTH,
    ):
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in names:
            table.add_column(name, no_wrap=True, justify="left" if name in LINE else "right")
        for line in lines:
            table.add_row(*(line[name] for name in names))
        print_table(table, WIDTH)
    print("times in ms, p50 / p99; TTFT: to a turn's first token, since it was sent; TPOT: per token after that")


def _blocks(widths: Mapping[str, int], room: int) -> list[list[str]]:
    """Names of columns, as many together as fit; each block begins with LINE."""
    blocks = [list(LINE)]
    for name in widths:
        if name in LINE:
            continue
        if sum(widths[other] + GAP for other in [*blocks[-1], name]) > room and len(blocks[-1]) > len(LINE):
            blocks.append(list(LINE))
        blocks[-1].append(name)
    return blocks


def _cells(level: Figures) -> dict[str, str]:
    answered = level["questions"] - level["unfinished"] or 1
    rate, ratio, accuracy = level["rate_per_s"], level["upscale_ratio"], level["accuracy"]
    return {
        "load": f"{level['concurrency']} at a time" if rate is None else f"{rate:g}/s",
        "resolution": level["resolution"],
        "failed": f"{level['unfinished'] / level['questions']:.1%}" if level["unfinished"] else "",
        "questions/s": f"{level['questions_per_s']:.3g}",
        "tokens/s": f"{level['tokens_per_s']:,.0f}",
        "latency": _percentiles(level["latency_ms"]),
        "TTFT": _percentiles(level["ttft_ms"]),
        "TTFT of turn 2": _percentiles(level["ttft_turn2_ms"]),
        "TPOT": _percentiles(level["tpot_ms"]),
        "looked again": "" if ratio is None else f"{ratio:.0%}",
        "visual tokens": f"{level['visual_tokens'] / answered:.0f}" if level["visual_tokens"] else "",
        "prefilled": f"{level['prefill_tokens'] / answered:.0f}",
        "right": "" if accuracy is None else f"{accuracy:.1%}",
    }


def _percentiles(times: Mapping[str, float] | None) -> str:
    if times is None:
        return ""
    return " / ".join(f"{ms:.3g}" if ms < 1000 else f"{ms:,.0f}" for ms in (times["p50"], times["p99"]))
