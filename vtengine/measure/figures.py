"""Figures of a level of load: what its rows add up to, and where its times lie."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtengine.measure.load import Load, Pass, Row
from vtengine.protocol.messages import Resolution
from vtengine.viewer.totals import UNFINISHED, Totals

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Level:
    """A load, the views that are shown under it, and the passes that were made: one per round."""

    resolution: Resolution
    load: Load
    passes: list[Pass] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.resolution}, {self.load}"


def figures(level: Level) -> dict[str, Any]:
    """One level as JSON data, over all rounds; rates are medians over the rounds.

    latency: from a question's coming to its answer, over all of its turns. ttft (time to first token): of a turn, from
    its request to the engine on. tpot (time per output token): of a turn, between its first token and its last.
    outside: of a question, what its turns leave of its latency: reading, decoding and resizing images, and waiting for
    the event loop. None where no row has such a time. Rows that were rejected or failed count in `unfinished` alone.
    """
    rounds = [_finished(one.rows) for one in level.passes]
    rows = [row for rows in rounds for row in rows]
    turns = [turn for row in rows for turn in row["turns"]]
    totals, by_round = Totals.of(rows), [Totals.of(rows) for rows in rounds]
    asked = sum(len(one.rows) for one in level.passes)
    return {
        "resolution": level.resolution,
        "concurrency": level.load.concurrency,
        "rate_per_s": level.load.rate_per_s,
        "rounds": len(rounds),
        "questions": asked,
        "unfinished": asked - len(rows),
        "wall_s": [round(one.wall_s, 6) for one in level.passes],
        "questions_per_s": _rate(level.passes, [len(rows) for rows in rounds]),
        "tokens_per_s": _rate(level.passes, [one.completion_tokens for one in by_round]),
        "prompt_tokens_per_s": _rate(level.passes, [one.prompt_tokens for one in by_round]),
        "latency_ms": _spread_ms(row["latency_s"] for row in rows),
        "ttft_ms": _spread_ms(row["turns"][0]["ttft_s"] for row in rows if row["turns"]),
        "ttft_turn2_ms": _spread_ms(row["turns"][1]["ttft_s"] for row in rows if len(row["turns"]) > 1),
        "tpot_ms": _spread_ms(_per_token_s(turn) for turn in turns if turn["completion_tokens"] > 1),
        "outside_ms": _spread_ms(
            max(0.0, row["latency_s"] - sum(turn["latency_s"] for turn in row["turns"])) for row in rows
        ),
        "upscale_ratio": totals.upscale_ratio,
        "accuracy": totals.accuracy,
        "visual_tokens": totals.visual_tokens,
        "visual_tokens_full": totals.visual_tokens_full,
        "prompt_tokens": totals.prompt_tokens,
        "prefill_tokens": totals.prompt_tokens - totals.cached_tokens,
        "completion_tokens": totals.completion_tokens,
        "images_encoded": sum(image.get("encoded") is True for turn in turns for image in turn["images"]),
    }


def _finished(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] not in UNFINISHED]


def _rate(passes: Sequence[Pass], counts: Sequence[int]) -> float:
    return statistics.median(count / one.wall_s for one, count in zip(passes, counts, strict=True))


def _per_token_s(turn: Row) -> float | None:
    if turn["ttft_s"] is None:
        return None
    seconds: float = (turn["latency_s"] - turn["ttft_s"]) / (turn["completion_tokens"] - 1)
    return seconds


def _spread_ms(seconds: Iterable[float | None]) -> dict[str, float] | None:
    """The mean, and PERCENTILES, each a time that was measured: the smallest one which so many per cent do not exceed.
    A question without such a time is None.
    """
    ordered = sorted(one for one in seconds if one is not None)
    if not ordered:
        return None
    spread = {"mean": 1e3 * statistics.fmean(ordered)}
    return spread | {f"p{p}": 1e3 * ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES}
