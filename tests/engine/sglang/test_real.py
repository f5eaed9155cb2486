"""A real SGLang on the CPU, in a process of its own: `make test-sglang`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.sglang.real import ENVIRONMENT

REPO = Path(__file__).resolve().parents[3]
LIMIT_S = 900

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(LIMIT_S)]


def run(*arguments, **environment):
    """Runs Python in a process group of its own."""
    paths = os.pathsep.join(str(REPO / part) for part in ("", "kernels", "training"))
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPO, env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True, text=True, timeout=LIMIT_S, start_new_session=True,
    )  # fmt: skip


def child(*arguments, **environment):
    """Its output, once it ended well."""
    done = run(*arguments, **environment)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def last_line(*arguments):
    """The JSON object that it prints at its end."""
    print(line := child("-m", *arguments).splitlines()[-1])
    return json.loads(line)


def both(quick):
    """The two ways to SGLang; the other one than `quick` is not part of CI."""
    kinds = ("sglang_http", "sglang_engine")
    return pytest.mark.parametrize(
        "kind", [kind if kind == quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]
    )


@both(quick="sglang_http")
def test_it_conforms(kind):
    output = child(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engine/conformance", VTENGINE_CONFORMANCE=kind
    )
    assert "passed" in output and "failed" not in output


@both(quick="sglang_engine")
def test_episodes_equal_those_of_the_embedded_engine(kind):
    folder = REPO / "vtengine" / "assets" / "glance"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the shipped model is not in this tree")
    report = last_line("tests.engine.sglang.compare", kind, str(folder))
    assert report["episodes"] == 3 and report["statuses"][0] == report["statuses"][1], report
    assert report["logprobs"] < 1e-4 and report["transformers"] < 1e-4
    assert report["processor"] < 1e-5
    # turn 2 prefills what is new in it, at most one token (a page) more; the tower sees every image once
    assert all(new <= prefilled <= new + 1 for prefilled, new in report["new_in_turn_2"]), report["new_in_turn_2"]
    assert report["encoded"] == [[False, True]] * 3
    ran_on, distinct = report["tower"]
    assert ran_on == distinct
    encoded, views, turns = report["siblings"]
    assert encoded == views and turns == 2
    difference, cached, encoded = report["cold"]
    assert difference < 1e-4 and cached == 0 and encoded == [True, True]
    status, error = report["trick"]
    if kind == "sglang_engine":
        assert status not in ("rejected", "failed"), error
    else:
        assert status == "rejected" and "text_spells_marker" in error
    # new vision weights by each way, over an image seen before
    assert report["ways"] == ["ByTensor", "ByBroadcast", "ByDisk"] and report["versions"] == [1, 2, 3]
    assert all(update < 1e-4 < moved for update, moved in zip(report["update"], report["moved"], strict=True)), report
    assert report["checksums"] == [[], [], []]


def test_grpo_learns_as_over_the_embedded_engine(tmp_path):
    """SGLang samples from the learner's weights of the step before, at every step; the reward rises as far."""
    report = last_line("tests.engine.sglang.learn", str(tmp_path))
    for run in report.values():
        assert max(run["mismatch/max"]) < 1e-4
        assert run["version"] == list(range(1, 11)) and set(run["staleness/mean"]) == {0}
        rewards = run["reward/mean"]
        assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    ends = [sum(run["reward/mean"][-3:]) / 3 for run in report.values()]
    assert abs(ends[0] - ends[1]) < 0.15


@pytest.mark.slow
def test_two_ranks_over_two_servers(tmp_path):
    """Under torchrun, weights by broadcast and by disk: both ranks sample from the weights that they hold in pieces."""
    report = last_line("tests.engine.sglang.several_ranks", str(tmp_path))
    assert report["versions"] == ["3", "3", "3"]
    for way in ("distributed", "disk"):  # in the second run a server is killed after the first step
        run = report[way]
        assert max(run["mismatch/max"]) < 1e-4 and set(run["staleness/mean"]) == {0}
        assert run["version"] == [1, 2, 3] and set(run["groups/used"]) == {4} and set(run["groups/failed"]) == {0}


def test_our_patchify_inside_sglang():
    """For requests that send encoded bytes: the pixels of a JPEG are ours, to what float32 tells."""
    report = last_line("tests.engine.sglang.patchified")
    assert report["hooks"] == ["flush", "patchify"] and report["processed"] == 0
    assert report["ids"][0] == report["ids"][1] and report["logprobs"] < 1e-5


def test_the_command_line_gives_the_engine_its_arguments():
    """Those that SGLang has; one that it has not is refused before anything starts."""
    picture = "examples/glance/images/test-0-00001.png"
    line = ["-m", "vtengine.cli", "ask", picture, "What is there?", "--max-new-tokens", "4", "--backend", "sglang"]
    refused = run(*line, "--engine-arg", "mem_fraction_statc=0.2", **ENVIRONMENT)
    assert refused.returncode == 2 and "did you mean mem_fraction_static?" in refused.stderr, refused.stderr
    arguments = ["--engine-arg", "mem-fraction-static=0.2", "--engine-arg", "max_total_tokens=4096"]
    assert child(*line, *arguments, **ENVIRONMENT).strip()


def test_a_silent_server_is_asked_for_its_health():
    """One that generates is waited for, one whose scheduler is frozen is lost."""
    report = last_line("tests.engine.sglang.silent")
    assert report["generates"] == ["length", 3000] and report["generates_s"] > 3
    assert "no answer in time" in report["frozen"] and 3 <= report["frozen_s"] < 30


def test_two_servers_and_one_is_killed():
    report = last_line("tests.engine.sglang.two_servers")
    assert report["together"] == 12 and min(report["per_server"]) > 0
    assert report["answers"] == report["asked"] == 36 and report["most"] == 1
    assert report["down"] == 1 and report["failovers"] >= 1
