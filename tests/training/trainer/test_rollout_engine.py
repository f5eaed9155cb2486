"""Rollouts over SGLang: the configuration, and a run against a server without a model (a real one: test_real.py)."""

from __future__ import annotations

import asyncio
import json
import os
from types import SimpleNamespace

import pytest
import torch
from vtengine_training.cli import main
from vtengine_training.sync.colocated import SharedParameters
from vtengine_training.trainer.command import train
from vtengine_training.trainer.loop import Run
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.rollout_engine import build_engine

from tests.engine.sglang.fake_server import FakeSglang
from tests.training.trainer.toy import rewarder
from vtengine.config import ConfigError, to_toml
from vtengine.engine.base import BackendFailed
from vtengine.engine.embedded import EmbeddedEngine


@pytest.fixture
def fakes(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    servers = [FakeSglang(internal_states=[{"vtengine_hooks": ["flush"]}]) for _ in range(2)]
    for fake in servers:
        fake.vocab, fake.image_token = config["vocab_size"], config["image_token_id"]
        fake.seeded = True  # replies differ, and so do their rewards
    yield servers
    for fake in servers:
        fake.close()


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"backend": "magic"}, "backend = 'magic'.*http://host:port"),
        ({"sync": "disk"}, "shares the learner's weights"),
        ({"release_memory": True}, "shares the learner's weights"),
        ({"engine_args": {"tp_size": 2}}, "engine_args: is for backend = \"sglang\".*'embedded'"),
    ],
)
def test_what_does_not_go_together(make_config, rollout, words) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config(rollout=rollout)


@pytest.mark.parametrize(
    ("sync", "wanted"), [("distributed", {"CUMEM": "1", "NVLS": "0"}), ("disk", {"CUMEM": "1", "NVLS": None})]
)
def test_nccl_is_set_up_as_in_sglang_before_anybody_meets(make_config, tmp_path, monkeypatch, sync, wanted) -> None:
    """Where both will be in one group; what the user has set stays."""
    found = {}

    def join(*_: object) -> None:
        found.update({name: os.environ.get(f"NCCL_{name}_ENABLE") for name in wanted})
        raise ValueError("seen")

    monkeypatch.setattr(Ranks, "join", join)
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "")  # is put back at the end
    monkeypatch.delenv("NCCL_NVLS_ENABLE")
    path = tmp_path / "run.toml"
    path.write_text(to_toml(make_config(rollout={"backend": "http://127.0.0.1:1", "sync": sync})))
    assert main(["grpo", str(path)]) == 2
    assert found == wanted


def test_embedded_is_the_default(make_config) -> None:
    one = Run(make_config(), rewarder())
    assert isinstance(one.parts.engine, EmbeddedEngine) and isinstance(one.parts.publisher, SharedParameters)
    asyncio.run(one.close())


@pytest.mark.parametrize(
    ("device", "given", "wanted"),
    [
        ("cpu", {}, {}),
        ("cuda:0", {}, {"mem_fraction_static": 0.5, "enable_memory_saver": True}),
        ("cuda:0", {"mem-fraction-static": 0.3}, {"mem-fraction-static": 0.3, "enable_memory_saver": True}),
        ("cpu", {"tp-size": 2, "tp_size": 4}, {"tp-size": 2, "tp_size": 4}),  # is refused there, as given twice
    ],
)
def test_an_engine_beside_a_learner_leaves_memory_to_it(make_config, monkeypatch, device, given, wanted):
    made = {}
    monkeypatch.setattr("vtengine.engine.sglang.SglangEngineBackend", lambda folder, **options: made.update(options))
    config = make_config(rollout={"backend": "sglang", "release_memory": True, "engine_args": given})
    model = SimpleNamespace(device=torch.device(device))
    build_engine(config, None, model, None, Ranks())
    assert made["arguments"] == wanted and made["device"] == device


@pytest.fixture
def many_questions(tiny_data):
    """Thirty about one picture. Which server one goes to depends on its text and on the servers' ports."""
    path = tiny_data.with_name("many.jsonl")
    rows = ({"id": f"m{k}", "image": "2.png", "question": f"{k}?", "answer": str(k)} for k in range(30))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_two_servers_get_every_version_of_the_weights(make_config, fakes, many_questions) -> None:
    addresses = ",".join(fake.url for fake in fakes)
    rows: list[dict] = []
    rollout = {"backend": addresses, "release_memory": True, "prompts": 8}
    one = Run(make_config(steps=2, data={"files": [str(many_questions)]}, rollout=rollout), rewarder())
    asyncio.run(train(one, rows.append))
    assert all(fake.requests for fake in fakes), "no server went without a prompt"
    for fake in fakes:
        calls = [name for name, _ in fake.calls]
        assert calls.count("release_memory_occupation") == calls.count("resume_memory_occupation") == 2
        assert calls.count("update_weights_from_disk") == 3
        assert fake.model["weight_version"] == str(one.parts.learner.version)
    asked = [sent["rid"] for fake in fakes for sent in fake.requests]
    assert len(set(asked)) == len(asked)


def test_servers_sample_ahead_with_the_version_before(make_config, fakes, many_questions) -> None:
    """They have weights of their own: no copy here, and one update per step as without."""
    rollout = {"backend": ",".join(fake.url for fake in fakes), "ahead": True, "prompts": 8}
    rows: list[dict] = []
    one = Run(make_config(steps=3, data={"files": [str(many_questions)]}, rollout=rollout), rewarder())
    assert one.parts.learner.policy.model is one.parts.model
    asyncio.run(train(one, rows.append))
    assert [row["staleness/mean"] for row in rows] == [0, 1, 1]
    for fake in fakes:
        assert [name for name, _ in fake.calls].count("update_weights_from_disk") == 4


def test_weights_that_the_server_does_not_take_end_the_run(make_config, fakes) -> None:
    fakes[0].always.add("update_weights_from_disk")
    one = Run(make_config(steps=2, rollout={"backend": fakes[0].url}), rewarder())
    with pytest.raises(BackendFailed, match="update_weights_from_disk: out of memory"):
        asyncio.run(train(one, lambda row: None))
