"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

from vtengine.viewer.totals import Totals


def summary_rows(totals: Totals, wall_s: float | None, fresh_rows: int, fresh_tokens: int) -> Iterator[tuple[str, str]]:
    """(name, value) pairs. wall_s: seconds this run took for its `fresh_rows` rows and the tokens it wrote in them."""
    by_status = ", ".join(f"{count:,} {name}" for name, count in totals.statuses)
    yield "rows", f"{totals.rows:,}" + (f"  ({by_status})" if by_status else "")
    if totals.codes:
        yield "rejected or failed", ", ".join(f"{count:,} {code}" for code, count in totals.codes)
    if totals.accuracy is not None:
        counts = f"{totals.correct:,} of {totals.scored:,} with an answer{totals.left_out}"
        yield "accuracy", f"{totals.accuracy:.1%}  ({counts})"
    if totals.upscale_ratio is not None:
        yield "upscale ratio", f"{totals.upscale_ratio:.1%}  ({totals.upscaled:,} asked for more pixels)"
    if totals.visual_ratio is not None:
        counts = f"{totals.visual_tokens:,} of {totals.visual_tokens_full:,}"
        yield "visual tokens against always-high", f"{totals.visual_ratio:.1%}  ({counts})"
    if totals.answered:
        share = totals.resumed_tokens / max(1, totals.later_prompt_tokens)
        yield "tokens resumed from the cache", f"{totals.resumed_tokens:,}  ({share:.1%} of the later turns' prompts)"
    if totals.prompt_tokens:
        prefilled = totals.prompt_tokens - totals.cached_tokens
        yield "tokens prefilled", f"{prefilled:,} of {totals.prompt_tokens:,} in prompts"
    if wall_s and fresh_rows:
        rates = f"{fresh_rows / wall_s:.1f} rows/s, {fresh_tokens / wall_s:,.0f} tokens/s"
        yield "throughput", f"{rates}  ({wall_s:.1f} s)"


def print_summary(
    totals: Totals, wall_s: float | None, fresh_rows: int, fresh_tokens: int, stream: TextIO | None = None
) -> None:
    """Writes the table to `stream` (default: stdout); colours only on a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from vtengine.cli.tables import print_table

    table = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in summary_rows(totals, wall_s, fresh_rows, fresh_tokens):
        table.add_row(name, value)
    print_table(table, 120, stream)
