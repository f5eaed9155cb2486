"""Figures against numbers worked out by hand and by numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vtengine.measure.figures import Level, _spread_ms, figures
from vtengine.measure.load import Load, Pass


def turn(ttft_s: float, latency_s: float, written: int, prompt: int = 10, cached: int = 4) -> dict[str, Any]:
    images = [{"width": 28, "height": 28, "visual_tokens": 1, "encoded": True}]
    tokens = {"prompt_tokens": prompt, "cached_tokens": cached, "prefill_tokens": prompt - cached}
    return tokens | {"completion_tokens": written, "images": images, "ttft_s": ttft_s, "latency_s": latency_s}


def row(latency_s: float, *turns: dict[str, Any], correct: bool = True) -> dict[str, Any]:
    sums = {"visual_tokens": len(turns), "visual_tokens_full": 4, "upscaled": len(turns) > 1}
    return {
        "status": "answered",
        "latency_s": latency_s,
        "turns": list(turns),
        "expected": ["x"],
        "correct": correct,
    } | sums


FAILED = {"status": "failed", "latency_s": 9.0, "turns": [], "error": {"code": "backend_failed"}, "upscaled": False}


def test_by_hand() -> None:
    """Two questions and one that failed, in two rounds; the second round took twice as long."""
    one = row(0.5, turn(0.1, 0.4, written=4))
    two = row(1.0, turn(0.2, 0.5, written=1), turn(0.05, 0.25, written=5, prompt=30, cached=24), correct=False)
    level = Level("adaptive", Load(concurrency=2), [Pass((one, two, FAILED), 1.0), Pass((one, two, FAILED), 2.0)])
    found = figures(level)
    assert found["questions"] == 6 and found["unfinished"] == 2 and found["rounds"] == 2
    assert found["questions_per_s"] == pytest.approx((2 / 1 + 2 / 2) / 2)
    assert found["tokens_per_s"] == pytest.approx((10 / 1 + 10 / 2) / 2)
    assert found["prompt_tokens_per_s"] == pytest.approx((50 / 1 + 50 / 2) / 2)
    assert found["latency_ms"] == {"mean": 750, "p50": 500, "p90": 1000, "p99": 1000}
    assert found["ttft_ms"]["p50"] == pytest.approx(100)
    assert found["ttft_turn2_ms"]["p99"] == pytest.approx(50)
    assert found["tpot_ms"] == pytest.approx({"mean": 75, "p50": 50, "p90": 100, "p99": 100}), "one token has none"
    assert found["outside_ms"] == pytest.approx({"mean": 175, "p50": 100, "p90": 250, "p99": 250})
    assert found["accuracy"] == 0.5 and found["upscale_ratio"] == 0.5
    assert (found["prompt_tokens"], found["prefill_tokens"], found["completion_tokens"]) == (100, 36, 20)
    assert found["images_encoded"] == 6 and found["visual_tokens"] == 6


def test_without_a_row_that_was_answered() -> None:
    found = figures(Level("high", Load(rate_per_s=2.0), [Pass((FAILED,), 1.0)]))
    assert found["questions_per_s"] == 0 and found["unfinished"] == 1
    times = ("latency_ms", "ttft_ms", "ttft_turn2_ms", "tpot_ms", "outside_ms")
    assert [found[name] for name in times] == [None] * 5
    assert found["accuracy"] is None and found["upscale_ratio"] is None


def test_a_reply_without_a_text_has_no_first_token() -> None:
    silent = row(0.5, turn(0.1, 0.4, written=4) | {"ttft_s": None})
    found = figures(Level("high", Load(concurrency=1), [Pass((silent,), 1.0)]))
    assert found["ttft_ms"] is None and found["tpot_ms"] is None and found["latency_ms"]["p50"] == 500


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 101, 1000])
def test_percentiles_are_times_that_were_measured(count: int) -> None:
    seconds = np.random.default_rng(count).exponential(size=count)
    wanted = np.percentile(seconds, [50, 90, 99], method="inverted_cdf") * 1e3
    found = _spread_ms(seconds.tolist())
    assert found is not None and list(found.values()) == pytest.approx([1e3 * seconds.mean(), *wanted], rel=1e-12)
