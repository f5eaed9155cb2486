"""Rows of the public contract; files that were torn and go on."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vtengine.engine.base import SamplingParams
from vtengine.engine.scripted import ScriptedBackend
from vtengine.protocol.conversation import Limits
from vtengine.protocol.messages import ErrorInfo
from vtengine.protocol.profile import load_profile
from vtengine.protocol.tools import RESIZE_CALL
from vtengine.rollout.episode import Episode, run_episode
from vtengine.rollout.question import Question
from vtengine.rollout.records import (
    RowWriter,
    encode_row,
    episode_row,
    read_rows,
    rejected_row,
    whole_rows,
)
from vtengine.rollout.tokenizer import Tokenizer

GLANCE = load_profile("glance")
ROW_KEYS = (
    *("id", "sample", "status", "error", "answer", "upscaled", "turns"),
    *("visual_tokens", "visual_tokens_full", "latency_s", "logprob_sum"),
)
TURN_KEYS = (
    *("text", "finish", "action", "prompt_tokens", "cached_tokens", "prefill_tokens", "completion_tokens"),
    *("images", "latency_s", "ttft_s"),
)
ROWS = [{"id": index, "sample": 0, "text": "né " * index} for index in range(5)]


@pytest.fixture
def episode(small_tokenizer: Tokenizer, pipeline: Any) -> Episode:
    replies = [GLANCE.reply_call("small", RESIZE_CALL), GLANCE.reply_answer("clear", "né 5")]
    backend = ScriptedBackend(small_tokenizer, replies)
    question = Question("q1", "560x560", "What?", carried={"image": "560x560", "status": "theirs", "level": 3})
    return asyncio.run(
        run_episode(question, backend, pipeline, small_tokenizer, GLANCE, Limits(), SamplingParams(max_new_tokens=999))
    )


def test_a_row_is_as_the_contract_says(episode: Episode) -> None:
    row = json.loads(encode_row(episode_row(episode, 2)))
    assert tuple(row) == (*ROW_KEYS, "image", "level")
    assert (row["id"], row["sample"], row["status"], row["error"]) == ("q1", 2, "answered", None)
    assert (row["answer"], row["upscaled"], row["visual_tokens"], row["visual_tokens_full"]) == ("né 5", True, 500, 400)
    for turn in row["turns"]:
        assert tuple(turn) == TURN_KEYS
        assert turn["cached_tokens"] + turn["prefill_tokens"] == turn["prompt_tokens"]
    assert [turn["action"] for turn in row["turns"]] == ["resize", None]
    assert row["turns"][1]["images"] == [{"width": 560, "height": 560, "visual_tokens": 400, "encoded": True}]
    own = sum(turn["completion_tokens"] for turn in row["turns"])
    assert row["logprob_sum"] == pytest.approx(-0.125 * own)


def test_rejected_rows_have_the_same_keys(episode: Episode) -> None:
    row = rejected_row("line-3", 0, ErrorInfo("line_not_json", "no"), {"id": "theirs", "note": 1})
    assert tuple(row) == (*ROW_KEYS, "note")
    assert (row["id"], row["status"], row["error"]) == (
        "line-3",
        "rejected",
        {"code": "line_not_json", "message": "no"},
    )


def test_no_nan_reaches_a_file(episode: Episode) -> None:
    at = episode.transcript.sampled[0].start
    episode.transcript.logprobs[at] = float("-inf")
    assert episode_row(episode, 0)["logprob_sum"] is None
    with pytest.raises(ValueError, match="Out of range"):
        encode_row({"x": float("nan")})


def test_a_failed_episode_has_a_row(episode: Episode) -> None:
    failed = replace(
        episode, status="failed", error=ErrorInfo("backend_failed", "x"), answer=None, turns=(), image=None
    )
    row = episode_row(failed, 0)
    assert row["error"] == {"code": "backend_failed", "message": "x"}
    assert (row["turns"], row["visual_tokens"], row["visual_tokens_full"], row["upscaled"]) == ([], 0, 0, False)


def test_cut_anywhere_the_whole_rows_are_read(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    with RowWriter(whole) as writer:
        for row in ROWS:
            writer.append(row)
    data = whole.read_bytes()
    assert list(read_rows(whole)) == ROWS
    for size in range(len(data) + 1):
        torn = tmp_path / "torn.jsonl"
        torn.write_bytes(data[:size])
        assert list(read_rows(torn)) == ROWS[: data[:size].count(b"\n")]


def test_rows_are_there_at_once(tmp_path: Path) -> None:
    with RowWriter(tmp_path / "o.jsonl") as writer:
        writer.append(ROWS[1])
        assert list(read_rows(tmp_path / "o.jsonl")) == [ROWS[1]]
    writer.close()


def test_a_new_file_forgets_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    path.write_text("old\n")
    RowWriter(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("tail", [b"{\n", b"\xff\n", b"[1]\n", b"\n", b"[" * 100_000 + b"\n"])
def test_only_the_last_line_may_be_broken(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "o.jsonl"
    path.write_bytes(encode_row(ROWS[0]) + tail)
    assert list(whole_rows(path)) == [(ROWS[0], len(encode_row(ROWS[0])))]
    path.write_bytes(encode_row(ROWS[0]) + tail + encode_row(ROWS[1]))
    with pytest.raises(ValueError, match="line 2 is not a row of JSON, and it is not the last one"):
        list(read_rows(path))
