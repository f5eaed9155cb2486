"""Two ranks over the same two SGLang servers, without a model (real ones: test_real.py): as one; faults reach both."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vtengine_training.trainer.checkpoint import find_latest
from vtengine_training.trainer.loop import Run
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.rollout_engine import episodes_at_a_time

from tests.engine.sglang.fake_server import FakeSglang
from tests.engine.sglang.scheduler import KILLED, schedulers
from tests.training.trainer import ranks_worker
from tests.training.trainer.toy import rewarder
from vtengine.config import to_toml

OF_THE_CUT = ("time/", "samples/", "memory/", "patches/encoded")
"""Figures that depend on who does the work: groups of one micro-batch share their images."""
VISION_IS_FLUSHED = [{"vtengine_hooks": ["flush"]}]


@pytest.fixture
def fakes(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    servers = [FakeSglang(internal_states=VISION_IS_FLUSHED) for _ in range(2)]
    for fake in servers:
        fake.vocab, fake.image_token = config["vocab_size"], config["image_token_id"]
        fake.seeded = fake.reads = True
    yield servers
    for fake in servers:
        fake.close()


@pytest.fixture
def questions(tiny_data):
    """Which server one goes to depends on its text and on the servers' ports: enough of them for both."""
    path = tiny_data.with_name("sixteen.jsonl")
    rows = ({"id": f"m{k}", "image": f"{1 + k % 2}.png", "question": f"{k}?", "answer": str(k)} for k in range(16))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(make_config, fakes, questions):
    """config(folder, **changes): three steps over the servers."""

    def make(name: str, **changes):
        base = make_config()
        data = {
            "steps": 3,
            "output": f"{base.output}-{name}",
            "data": {"files": [str(questions)]},
            "rollout": {"prompts": 4, "n": 4, "backend": ",".join(fake.url for fake in fakes)},
            "loss": {"old_logprobs": "recompute"},
            "reward": {"penalty": {"form": "off"}, "accuracy": "function", "function": "toy_reward:low_bytes"},
        }
        return make_config(**data | changes)

    return make


def asked(fakes):
    """(prompt, seed) of all requests; forgotten afterwards."""
    found = [(tuple(sent["input_ids"]), sent["sampling_params"]["sampling_seed"]) for f in fakes for sent in f.requests]
    for fake in fakes:
        fake.requests.clear()
        fake.calls.clear()
    return sorted(found)


def once(condition, act):
    """act() as soon as condition() holds."""

    def watch():
        until = time.monotonic() + 120
        while not condition() and time.monotonic() < until:
            time.sleep(0.002)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def timeless(row):
    return {name: value for name, value in row.items() if not name.startswith(OF_THE_CUT)}


def same_rows(found, expected):
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert timeless(row) == pytest.approx(timeless(wanted), rel=1e-3, abs=1e-6)


def same_weights(found, expected):
    assert found.keys() == expected.keys()
    assert max(float((found[name] - wanted).abs().max()) for name, wanted in expected.items()) < 1e-4


def exported(config):
    folder = find_latest(Path(config.output) / "checkpoints")
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("ahead", [False, True])
def test_two_ranks_are_as_one(config, fakes, ranks, ahead) -> None:
    """Questions, replies, figures, the weights that both servers got and those that were saved."""
    rollout = {"prompts": 4, "n": 4, "backend": ",".join(fake.url for fake in fakes), "ahead": ahead}
    one, two = config("one", rollout=rollout), config("two", rollout=rollout)
    expected = ranks_worker.curve(Run(one, rewarder()), 99)
    sent, loaded = asked(fakes), dict(fakes[0].loaded)
    found = ranks(two, "curve-99")
    same_rows(found, expected)
    assert found[-1]["version"] == 3 and found[-1]["grad_norm"] > 0
    homes = defaultdict(set)
    for fake in fakes:
        for request in fake.requests:
            homes[tuple(request["input_ids"])].add(fake.url)
    assert {len(urls) for urls in homes.values()} == {1} and all(fake.requests for fake in fakes)
    for fake in fakes:
        assert [name for name, _ in fake.calls].count("update_weights_from_disk") == 4, "once for each version"
        assert fake.model["weight_version"] == "3"
        same_weights(fake.loaded, loaded)
    same_weights(exported(two), loaded)
    assert asked(fakes) == sent
    moved = load_file(Path(one.model) / "model.safetensors")
    assert max(float((loaded[name] - moved[name]).abs().max()) for name in moved) > 1e-3


def test_adapters_of_two_ranks_are_as_those_of_one(config, fakes, ranks) -> None:
    """What the servers get are weights with the adapters in them."""
    pytest.importorskip("peft")
    changes = {"lora": {"rank": 4}, "steps": 2, "checkpoint": {"every": 10}}
    expected = ranks_worker.curve(Run(config("one", **changes), rewarder()), 99)
    loaded = dict(fakes[0].loaded)
    found = ranks(config("two", **changes), "curve-99")
    same_rows(found, expected)
    same_weights(fakes[0].loaded, loaded)


@pytest.mark.parametrize("ahead", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_server_dies_in_the_middle_and_nothing_is_lost(config, fakes, ranks, ahead) -> None:
    changes = {"rollout": {"prompts": 8, "n": 4, "backend": ",".join(fake.url for fake in fakes), "ahead": ahead}}
    victim, other = fakes
    seen = []

    def in_step_two() -> bool:
        if victim.model["weight_version"] == "1" and not seen:
            seen.append(len(victim.requests))
        return bool(seen) and len(victim.requests) > seen[0]

    for fake in fakes:
        fake.token_s = 0.005
    killer = once(in_step_two, lambda: victim.always.add("dead"))
    found = ranks(config("two", **changes), "curve-99")
    killer.join()
    assert [(row["version"], row["groups/used"], row["groups/failed"]) for row in found] == [
        (k, 8, 0) for k in (1, 2, 3)
    ]
    assert other.model["weight_version"] == "3" and victim.model["weight_version"] in ("1", "2")


def test_a_server_dies_in_the_middle_of_a_broadcast(config, fakes, ranks) -> None:
    """It is sent version 2 when it dies: both ranks go on with the other server, which has what was learned."""
    backend = {"backend": ",".join(fake.url for fake in fakes), "prompts": 4, "n": 4, "sync": "distributed"}
    run = config("broadcast", rollout=backend)
    with schedulers(2, {"update_weights_from_distributed": (3, KILLED)}) as connections:
        for fake, connection in zip(fakes, connections, strict=True):
            fake.scheduler = connection
        found = ranks(run, "curve-99")
    victim, other = fakes
    assert [(row["version"], row["groups/failed"]) for row in found] == [(1, 0), (2, 0), (3, 0)]
    assert (victim.model["weight_version"], other.model["weight_version"]) == ("1", "3")
    same_weights({name: torch.from_numpy(value) for name, value in other.loaded.items()}, exported(run))


def ends(processes, within_s):
    """Exit statuses; whoever does not end in time fails the test, and its log says where it was."""
    until = time.monotonic() + within_s
    try:
        return [process.wait(timeout=max(0.1, until - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)
            process.wait()
        raise


@pytest.fixture
def command(start_ranks, tmp_path):
    """command(config): two ranks of the command line, and a function that gives what each of them said."""

    def start(config):
        path = tmp_path / "run.toml"
        path.write_text(to_toml(config))
        processes = start_ranks("-m", "vtengine_training.cli", "grpo", str(path))
        return processes, lambda: [(tmp_path / f"rank-{rank}.err").read_text() for rank in range(2)]

    return start


@pytest.mark.parametrize("version", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_weights_that_a_server_refuses_end_all_ranks(config, fakes, command, version) -> None:
    def refuse():
        fakes[1].always.add("update_weights_from_disk")

    if version:
        once(lambda: fakes[1].model["weight_version"] != "default", refuse)
    else:
        refuse()
    processes, said = command(config("refused"))
    assert ends(processes, 120) == [1, 1]
    for rank, words in enumerate(said()):
        assert f"vtengine-train (rank {rank})" in words and "update_weights_from_disk: out of memory" in words, words


def stop_one(fakes, process, how):
    """When the first step is over: from here on the clock of what follows runs, however long the start took."""
    once(lambda: fakes[0].model["weight_version"] not in ("default", "0"), lambda: process.send_signal(how)).join()


def test_a_rank_that_is_killed_ends_the_others(config, fakes, command) -> None:
    processes, said = command(config("killed", steps=200))
    stop_one(fakes, processes[1], signal.SIGKILL)
    assert ends(processes, 120) == [1, -signal.SIGKILL]
    assert "another rank ended" in said()[0] or "Connection closed by peer" in said()[0]


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_after_the_timeout(config, fakes, command) -> None:
    processes, said = command(config("hangs", steps=200, rank_timeout_s=4.0))
    stop_one(fakes, processes[0], signal.SIGSTOP)
    assert processes[1].wait(timeout=120) == 1
    assert "did not answer in time (rank_timeout_s)" in said()[1] or "Timed out" in said()[1]


def test_servers_are_asked_by_all_ranks_together_for_so_many_episodes(config) -> None:
    shared = config("many")
    assert [episodes_at_a_time(shared, Ranks(0, size)) for size in (1, 3, 64)] == [64, 22, 1]
