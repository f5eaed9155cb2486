"""`vtengine measure`: levels in rounds, empty caches, tables, files, and what ends it early."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_server_backend import fake as fake  # the fixture
from tests.engine.sglang.fake_server import FakeSglang
from tests.server.conftest import serve as serve  # the fixture
from tests.server.conftest import tokenizer as tokenizer
from tests.server.running import MODEL
from vtengine.cli.measure_table import _blocks
from vtengine.measure import load
from vtengine.measure.load import Pass, run_load
from vtengine.server.config import ServerLimits

Run = Callable[..., Any]


def levels(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["levels"]
    return found


def test_levels_and_files(scripted: Run, vtengine: Run, questions: Run, tmp_path: Path) -> None:
    out, picture = tmp_path / "load.json", tmp_path / "load.svg"
    loads = ("--concurrency", "1, 3", "--rate", "400", "--against", "high", "--rounds", 2)
    done = vtengine("measure", questions(6), *loads, "-o", out, "--plot", picture, *scripted(0.01))
    assert done.status == 0, done.err
    found = levels(out)
    names = [(one["resolution"], one["concurrency"], one["rate_per_s"]) for one in found]
    loads_of = [(1, None), (3, None), (None, 400.0)]
    assert names == [(view, *load) for load in loads_of for view in ("adaptive", "high")]
    for one in found:
        assert one["rounds"] == 2 and one["questions"] == 12 and one["unfinished"] == 0 and len(one["wall_s"]) == 2
        assert (one["upscale_ratio"] > 0) == (one["resolution"] == "adaptive")
        assert one["latency_ms"]["p50"] >= 10 and one["questions_per_s"] > 0
    assert found[2]["questions_per_s"] > 1.5 * found[0]["questions_per_s"], "three at a time wait together"
    document = json.loads(out.read_text())
    assert document["finished"] is True and document["settings"]["rounds"] == 2 and document["stamp"]["machine"]
    assert picture.read_text().count("<svg") == 1
    assert "3 at a time" in done.out and "400/s" in done.out and "looked again" in done.out


def test_rows_behind_the_figures(scripted: Run, vtengine: Run, questions: Run, rows_of: Run, tmp_path: Path) -> None:
    out, path = tmp_path / "load.json", tmp_path / "rows.jsonl"
    loads = ("--concurrency", 2, "--rate", "400", "--rounds", 2)
    assert vtengine("measure", questions(3), *loads, "-o", out, "--rows", path, *scripted(0.01)).status == 0
    rows = rows_of(path)
    places = [(level, turn, f"q{index}") for level in (0, 1) for turn in (0, 1) for index in range(3)]
    assert [(row["level"], row["round"], row["id"]) for row in rows] == places
    for number, level in enumerate(levels(out)):
        slowest = max(row["latency_s"] for row in rows if row["level"] == number)
        assert level["latency_ms"]["p99"] == pytest.approx(1e3 * slowest)


def test_every_pass_finds_the_caches_empty(checkpoint: Path, vtengine: Run, questions: Run, tmp_path: Path) -> None:
    """Each one encodes every image and prefills as much as the first."""
    out = tmp_path / "load.json"
    flags = ("--model", checkpoint, "--max-new-tokens", 4, "--concurrency", "1,2", "--rounds", 2, "-o", out)
    assert vtengine("measure", questions(5), *flags).status == 0
    one, two = levels(out)
    assert one["images_encoded"] == two["images_encoded"] == 10, "5 in each round"
    assert one["prefill_tokens"] == two["prefill_tokens"]
    assert 0 < one["prefill_tokens"] < one["prompt_tokens"], "what all prompts begin with is in the cache"


def test_only_rates(scripted: Run, vtengine: Run, questions: Run, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    assert vtengine("measure", questions(3), "--rate", "500", "-o", out, *scripted()).status == 0
    assert [one["concurrency"] for one in levels(out)] == [None]


def test_questions_that_fail_are_in_no_figure(scripted: Run, vtengine: Run, questions: Run, tmp_path: Path) -> None:
    path = questions(3, {"image": "missing.png", "question": "What?"}, b"{not json", {"question": ""})
    done = vtengine("measure", path, "--concurrency", 2, "--rounds", 1, "-o", tmp_path / "o.json", *scripted())
    assert done.status == 3
    (level,) = levels(tmp_path / "o.json")
    assert level["questions"] == 4 and level["unfinished"] == 1
    assert "2 lines are left out (line 5: " in done.err
    assert "1 questions were rejected or failed" in done.out and "image_not_found" in done.out


def test_against_a_chat_server(serve: Run, vtengine: Run, questions: Run, tmp_path: Path) -> None:
    server, out = serve(), tmp_path / "load.json"
    flags = ("--chat", f"{server.url}/v1", "--concurrency", 2, "--rounds", 1, "--against", "high", "-o", out)
    done = vtengine("measure", questions(4), *flags)
    assert done.status == 0, done.err
    adaptive, high = levels(out)
    assert adaptive["upscale_ratio"] == 1 and high["upscale_ratio"] == 0
    assert adaptive["ttft_turn2_ms"] is None, "a client does not see where a turn begins"
    assert "2 passes over 4 questions each want more than its 4;" in done.err
    asked = [request.images[0].content_hash for request in server.backend.requests if len(request.images) == 1]
    assert len(asked) == 16, "4 to warm up and 4 to measure, of each resolution"


def test_a_servers_caches_are_emptied_and_its_weights_keep_their_name(
    fake: FakeSglang, checkpoint: Path, vtengine: Run, questions: Run, tmp_path: Path
) -> None:
    fake.model["weight_version"] = "step-17"
    out = tmp_path / "load.json"
    line = ["measure", questions(3), "--model", checkpoint, "--backend", fake.url, "--max-new-tokens", 4, "-o", out]
    line += ["--concurrency", "1,2", "--rounds", 2]
    assert vtengine(*line).status == 0
    one, two = levels(out)
    assert one["prefill_tokens"] == two["prefill_tokens"] and one["images_encoded"] == two["images_encoded"] == 6
    assert fake.flushes > 0 and fake.model["weight_version"] == "step-17"
    fake.flush_refusals = 10**6
    done = vtengine(*line)
    assert done.status == 1 and done.err.count(fake.url) == 1 and "somebody else's requests run there" in done.err


def test_what_was_measured_is_told_when_the_server_is_lost(
    fake: FakeSglang, checkpoint: Path, vtengine: Run, questions: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def last(*arguments: Any) -> Pass:
        done = await run_load(*arguments)
        fake.always.add("dead")
        return done

    monkeypatch.setattr(load, "run_load", last)
    out = tmp_path / "load.json"
    line = ["measure", questions(3), "--model", checkpoint, "--backend", fake.url, "--max-new-tokens", 4, "-o", out]
    done = vtengine(*line, "--concurrency", "1,2")
    assert done.status == 1 and "1 at a time" in done.out and fake.url in done.err
    document = json.loads(out.read_text())
    assert document["finished"] is False and [one["rounds"] for one in document["levels"]] == [1]


def test_it_ends_where_all_that_warm_up_fail(scripted: Run, vtengine: Run, questions: Run, tmp_path: Path) -> None:
    path = questions(0, *({"image": f"no{index}.png", "question": "What?"} for index in range(40)))
    done = vtengine("measure", path, *scripted())
    assert done.status == 1 and done.out == ""
    assert "the first 16 questions all failed; the first of them, row 'line-" in done.err
    assert "image_not_found" in done.err


def test_a_server_with_too_little_room(serve: Run, vtengine: Run, questions: Run, tmp_path: Path) -> None:
    """Those that it turns away at 8 at a time stand beside that level's figures."""
    server, out = serve(delay_s=0.05, limits=ServerLimits(max_running=1, max_waiting=1)), tmp_path / "load.json"
    flags = ("--chat", f"{server.url}/v1", "--concurrency", "1,8", "--rounds", 1, "-o", out)
    done = vtengine("measure", questions(12), *flags)
    assert done.status == 3 and "http_429" in done.out
    one, eight = levels(out)
    assert one["unfinished"] == 0 < eight["unfinished"] < 12
    assert f"{eight['unfinished'] / 12:.1%}" in done.out
    settings = json.loads(out.read_text())["settings"]
    assert settings["model"] == MODEL and "backend" not in settings


def test_a_deadline_is_for_a_chat_server_too(serve: Run, vtengine: Run, questions: Run) -> None:
    server = serve(delay_s=2.0)
    flags = ("--chat", f"{server.url}/v1", "--concurrency", 2, "--deadline-s", 0.2)
    done = vtengine("measure", questions(2), *flags)
    assert done.status == 1 and "deadline_exceeded: not done after 0.2 s (--deadline-s)" in done.err


def test_the_table_is_there_when_the_disk_is_full(scripted: Run, vtengine: Run, questions: Run) -> None:
    done = vtengine("measure", questions(2), "--rounds", 1, "-o", "/dev/full", *scripted())
    assert done.status == 1 and "1 at a time" in done.out
    assert done.err.endswith("/dev/full: cannot be written: No space left on device\n")


def test_columns_that_do_not_fit_stand_below() -> None:
    widths = {"load": 13, "resolution": 10, "a": 20, "b": 20, "c": 20, "d": 200, "e": 1}
    first = ["load", "resolution"]
    assert _blocks(widths, 160) == [[*first, "a", "b", "c"], [*first, "d"], [*first, "e"]]
    assert _blocks(widths, 80) == [[*first, "a", "b"], [*first, "c"], [*first, "d"], [*first, "e"]]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--chat", "http://127.0.0.1:9/v1", "--allow-private-hosts"), "lets no image in without --allow-http"),
        (("--chat", "127.0.0.1:9/v1"), "--chat 127.0.0.1:9/v1: is no http:// or https:// address"),
        (("--chat", "http://127.0.0.1:9/v1"), "does not list its models"),
        (("--chat", "http://127.0.0.1:9/v1", "--kv-gb", "2"), "--kv-gb 2.0: says how an engine of ours runs"),
        (("--chat", "http://127.0.0.1:9/v1", "--no-cuda-graphs"), "--no-cuda-graphs: says how an engine of ours runs"),
        (("--concurrency", "1,0"), "'0' is not a whole number >= 1"),
        (("--concurrency", ""), "'' is not a whole number"),
        (("--rate", "0"), "'0' is not a number > 0"),
        (("--plot", "load.gif"), "--plot load.gif: its name ends in .gif"),
        (("-o", "nowhere/load.json"), "its folder does not exist"),
        (("--against", "hi"), "invalid choice: 'hi'"),
    ],
)
def test_refusals(vtengine: Run, questions: Run, flags: tuple[str, ...], words: str) -> None:
    done = vtengine("measure", questions(1), *flags)
    assert done.status in (1, 2) and words in done.err
    assert done.out == ""


def test_an_input_without_questions(scripted: Run, vtengine: Run, questions: Run, tmp_path: Path) -> None:
    assert "holds no question" in vtengine("measure", questions(0), *scripted()).err
    assert "(line 1: " in vtengine("measure", questions(0, b"[1]"), *scripted()).err
    assert "cannot be read" in vtengine("measure", tmp_path / "none.jsonl", *scripted()).err
    path = questions(1)
    assert "is the input itself" in vtengine("measure", path, "-o", path, *scripted()).err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_shows_what_was_measured(
    scripted: Run,
    vtengine: Run,
    questions: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: int,
) -> None:
    """In the fourth pass, which is in the second round of two levels."""
    passes = []

    async def interrupted(*arguments: Any) -> Pass:
        passes.append(arguments)
        if len(passes) == 4:
            os.kill(os.getpid(), number)
            await asyncio.sleep(30)
        return await run_load(*arguments)

    monkeypatch.setattr(load, "run_load", interrupted)
    out = tmp_path / "load.json"
    done = vtengine("measure", questions(2), "--concurrency", "1,2", "-o", out, *scripted())
    assert done.status == status and "interrupted after 1 of 3 whole rounds" in done.err
    document = json.loads(out.read_text())
    assert document["finished"] is False and [one["rounds"] for one in document["levels"]] == [1, 2]
    assert "2 at a time" in done.out
