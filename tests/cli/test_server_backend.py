"""`--backend http://...`: the command reaches the server that it names, and no other engine."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.sglang.fake_server import FakeSglang
from vtengine.cli.arguments import engine_options
from vtengine.cli.session import sampling_settings

Run = Callable[..., Any]


@pytest.fixture
def fake(checkpoint: Path) -> Iterator[FakeSglang]:
    server = FakeSglang()
    config = json.loads((checkpoint / "config.json").read_text())
    server.vocab, server.image_token = config["vocab_size"], config["image_token_id"]
    yield server
    server.close()


def test_generate_over_a_server(
    fake: FakeSglang, checkpoint: Path, vtengine: Run, questions: Run, rows_of: Run, tmp_path: Path
) -> None:
    line = ["generate", questions(4), "-o", tmp_path / "out.jsonl", "--model", checkpoint, "--backend", fake.url]
    done = vtengine(*line, "--max-new-tokens", "6")
    assert done.status == 0, done.err
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["turns"][0]["completion_tokens"] for row in rows] == [6] * 4
    assert len(fake.requests) == 1 + 4, "the shared prompt, and one request for each question"
    assert sum(len(sent.get("image_data", [])) for sent in fake.requests) == 4


def test_a_server_that_is_not_there(checkpoint: Path, vtengine: Run, questions: Run, tmp_path: Path) -> None:
    line = ["generate", questions(1), "-o", tmp_path / "out.jsonl", "--model", checkpoint]
    done = vtengine(*line, "--backend", "http://127.0.0.1:9")
    assert done.status == 1 and done.err.count("\n") == 1 and "is it running" in done.err
    assert done.err.count("http://127.0.0.1:9") == 1


def test_engine_arguments_are_for_an_engine_in_the_process(vtengine: Run, questions: Run, tmp_path: Path) -> None:
    line = ["generate", questions(1), "-o", tmp_path / "out.jsonl", "--engine-arg", "tp_size=2"]
    for backend in ("embedded", "http://127.0.0.1:9"):
        done = vtengine(*line, "--backend", backend)
        assert done.status == 2 and f"is for --backend sglang, the backend is {backend}" in done.err


def test_a_turn_that_takes_too_long_has_failed(
    fake: FakeSglang, checkpoint: Path, vtengine: Run, questions: Run, rows_of: Run, tmp_path: Path
) -> None:
    """Of 8 tokens, 2 s; the shared prompt before them asks for one."""
    fake.token_s = 0.25
    line = ["generate", questions(2), "-o", tmp_path / "out.jsonl", "--model", checkpoint, "--backend", fake.url]
    line += ["--max-new-tokens", "8"]
    done = vtengine(*line, "--deadline-s", "1")
    assert done.status == 3, done.err
    for row in rows_of(tmp_path / "out.jsonl"):
        assert row["status"] == "failed" and "not done after 1.0 s (deadline_s)" in row["error"]["message"]
    fake.token_s = 0.0
    done = vtengine(*line, "--deadline-s", "0", "--resume")
    assert done.status == 0, done.err
    assert [row["turns"][0]["completion_tokens"] for row in rows_of(tmp_path / "out.jsonl")] == [8] * 2


def test_a_deadline_is_for_sglang(vtengine: Run, questions: Run, tmp_path: Path) -> None:
    done = vtengine("generate", questions(1), "-o", tmp_path / "out.jsonl", "--deadline-s", "5")
    assert done.status == 2 and "--deadline-s 5: is for --backend sglang or URL, the backend is embedded" in done.err


@pytest.mark.parametrize("flag", ["tp_size", "=2", "a.b=2"])
def test_engine_arguments_have_a_name_and_a_value(vtengine: Run, questions: Run, tmp_path: Path, flag: str) -> None:
    line = ["generate", questions(1), "-o", tmp_path / "out.jsonl", "--backend", "sglang", "--engine-arg", flag]
    done = vtengine(*line)
    assert done.status == 2 and f"--engine-arg {flag}: must look like NAME=VALUE" in done.err


def test_resume_compares_engine_arguments_that_decide_answers() -> None:
    def settings(*given: str) -> Any:
        flags = [word for one in given for word in ("--engine-arg", one)]
        arguments = engine_options(["--backend", "sglang", *flags])
        return sampling_settings(Namespace(**vars(arguments), n=1, image_root=None))["engine_arg"]

    assert settings() is settings("tp_size=2", "mem-fraction-static=0.5") is None
    assert settings("quantization=fp8", "tp-size=4") == {"quantization": "fp8"}
