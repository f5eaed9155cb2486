"""Stopping and going on gives, bit by bit, what an uninterrupted run gives."""

from __future__ import annotations

import asyncio
import json
import random
import resource
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vtengine_training.trainer.checkpoint import CheckpointError, find_latest
from vtengine_training.trainer.command import train
from vtengine_training.trainer.loop import Run
from vtengine_training.trainer.state import find_changes
from vtengine_training.trainer.trajectory import pack_groups, unpack_groups

from tests.training.trainer.toy import Drawn, rewarder
from vtengine.model import load_model

SETTINGS = {
    "rollout logprobs, one episode at a time": {"rollout": {"concurrency": 1, "oversample": 2.0, "max_refill": 6.0}},
    "recomputed logprobs, all at once": {
        "loss": {"old_logprobs": "recompute", "kl_coef": 0.01},
        "rollout": {"oversample": 2.0, "max_refill": 6.0, "max_stale": 0},
        "update": {"minibatch_prompts": 1},
    },
    "adapters": {
        "lora": {"rank": 3, "dropout": 0.1},
        "rollout": {"concurrency": 1, "oversample": 2.0, "max_refill": 6.0},
        "loss": {"kl_coef": 0.01},
    },
}


def run_until(config, step, function=None):
    """Runs (or goes on) until after `step`; returns the metrics."""
    one = Run(config, rewarder(function))
    rows = []

    def report(figures):
        rows.append(figures)
        one.stop_requested = figures["step"] >= step

    one.resume()
    asyncio.run(train(one, report))
    return rows


def timeless(row):
    return {
        name: value for name, value in row.items() if not name.startswith(("time/", "samples/", "memory/", "mismatch/"))
    }


def saved(config, output: str):
    folder = find_latest(Path(output) / "checkpoints")
    assert folder is not None
    state = json.loads((folder / "state.json").read_text())
    state["config"] = None
    state["of ranks"] = [json.loads(path.read_text()) for path in sorted(folder.glob("ranks/*/state.json"))]
    return state, {path.name: load_file(path) for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stops", [[2], [1, 3, 4]])
def test_resume_equals_uninterrupted(make_config, tmp_path, name, stops) -> None:
    """Five questions, two per step and some left over: the stops fall inside an epoch and at its end."""
    whole = make_config(steps=5, **SETTINGS[name])
    parts = replace(whole, output=str(tmp_path / "parts"))
    expected = run_until(whole, 5)
    rows = [row for stop in [*stops, 5] for row in run_until(parts, stop)]
    assert [timeless(row) for row in rows] == [timeless(row) for row in expected]
    states, tensors = zip(saved(whole, whole.output), saved(parts, parts.output), strict=True)
    for files in tensors[0], tensors[1]:
        for key in files["rollouts.safetensors"]:
            if key.endswith("logprobs") and "recompute" in str(whole.loss):
                files["rollouts.safetensors"][key] = torch.zeros(1)  # depends on what ran beside it, in the last digit
    assert states[0] == states[1]
    for file, content in tensors[0].items():
        assert content.keys() == tensors[1][file].keys()
        for key, value in content.items():
            assert torch.equal(value, tensors[1][file][key]), (file, key)


def test_a_reward_that_draws_at_random_resumes_to_the_bit(make_config, tmp_path) -> None:
    """Whatever was drawn before the run, in a validation, or in steps that another process has done."""
    settings = {"rollout": {"concurrency": 1}, "lora": {"rank": 3, "dropout": 0.1}}
    whole = make_config(steps=4, **settings)
    expected = run_until(whole, 4, Drawn())
    parts = make_config(
        steps=4, **settings, output=str(tmp_path / "parts"), validation={"every": 1, "files": whole.data.files}
    )
    rows = []
    for stop in (1, 3, 4):
        torch.manual_seed(stop), random.seed(stop), np.random.seed(stop)
        rows += run_until(parts, stop, Drawn())
    assert rows[0].keys() == {"step", "time/validate", *(name for name in rows[0] if name.startswith("val/"))}
    found = [{name: value for name, value in row.items() if not name.startswith("val/")} for row in rows[1:]]
    assert [timeless(row) for row in found] == [timeless(row) for row in expected]
    assert saved(whole, whole.output)[1].keys() == saved(parts, parts.output)[1].keys()
    for file, content in saved(whole, whole.output)[1].items():
        assert all(torch.equal(value, saved(parts, parts.output)[1][file][key]) for key, value in content.items())
    assert len({row["reward/mean"] for row in expected}) == 4
    other = make_config(seed=1, steps=1, **settings, output=str(tmp_path / "other"))
    assert run_until(other, 1, Drawn())[0]["reward/mean"] != expected[0]["reward/mean"]


def test_a_disk_that_is_full_costs_one_checkpoint(make_config, tmp_path) -> None:
    """As far as files may grow (RLIMIT_FSIZE): the kernel refuses the write in the middle of a file."""
    config = make_config(steps=2, **SETTINGS["rollout logprobs, one episode at a time"])
    expected = run_until(replace(config, output=str(tmp_path / "whole")), 2)
    rows = run_until(config, 1)
    one = Run(config, rewarder())
    one.resume()
    checkpoints = Path(config.output) / "checkpoints"
    before = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    one.step = 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            OSError, match=r"step-00000002: cannot be written: .*File too large.*older checkpoints stay"
        ):
            one.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        asyncio.run(one.close())
    assert {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()} == before
    rows += run_until(config, 2)
    assert [timeless(row) for row in rows] == [timeless(row) for row in expected]


def test_the_exported_model_is_a_checkpoint_of_its_own(make_config, tmp_path, tiny_folder) -> None:
    config = make_config(steps=1)
    run_until(config, 1)
    folder = find_latest(Path(config.output) / "checkpoints")
    assert folder is not None
    model = load_model(folder / "model")
    assert not torch.equal(model.embed_tokens.weight, load_model(tiny_folder).embed_tokens.weight)
    for name in ("tokenizer.json", "preprocessor_config.json", "config.json"):
        assert (folder / "model" / name).is_file()
    again = make_config(model=str(folder / "model"), output=str(tmp_path / "again"), steps=1)
    assert run_until(again, 1)[0]["step"] == 1


def test_resume_refuses_another_model_data_or_seed(make_config, tmp_path, tiny_data) -> None:
    config = make_config(steps=1)
    run_until(config, 1)
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    rows[0]["answer"] = "other"
    other = tiny_data.with_name("other.jsonl")
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = find_latest(Path(config.output) / "checkpoints") / "model"
    for changes, message in (
        ({"data": {"files": [str(other)]}}, "examples have changed"),
        ({"model": str(model)}, "other weights"),
        ({"data": {"files": [str(tiny_data)], "seed": 5}}, "data.seed = 0, not 5"),
        ({"seed": 5}, "seed = 0, not 5"),
        ({"resume": "never"}, "resume"),
        ({"loss": {"algorithm": "sft"}}, r"loss.algorithm = grpo, not sft.*with model = .*model"),
    ):
        one = Run(make_config(**changes), rewarder())
        try:
            with pytest.raises(CheckpointError, match=message):
                one.resume()
        finally:
            asyncio.run(one.close())


def test_resume_says_what_is_set_otherwise(make_config, tmp_path) -> None:
    """Any setting but those above may be another: a run goes on at another rate or with less memory."""
    config = make_config(steps=1)
    run_until(config, 1)
    update = replace(config.update, learning_rate=config.update.learning_rate / 2, recompute=True)
    one = Run(replace(config, update=update, threads=3), rewarder())
    try:
        assert one.resume()
    finally:
        asyncio.run(one.close())
    rate = config.update.learning_rate
    assert one.changes == [
        f"threads = 3 (was {config.threads})",
        f"update.learning_rate = {rate / 2} (was {rate})",
        "update.recompute = true (was false)",
    ]


def test_engine_arguments_may_differ_and_are_named(make_config) -> None:
    before = make_config(rollout={"backend": "sglang", "engine_args": {"tp_size": 2, "mem_fraction_static": 0.7}})
    after = replace(before, rollout=replace(before.rollout, engine_args={"tp_size": 2, "quantization": "fp8"}))
    saved = json.loads(json.dumps(asdict(before)))
    assert find_changes(saved, before) == []
    assert find_changes(saved, after) == [
        'rollout.engine_args.quantization = "fp8" (was left out)',
        "rollout.engine_args.mem_fraction_static = left out (was 0.7)",
    ]


def test_groups_survive_packing(make_config) -> None:
    one = Run(make_config(), rewarder())
    try:
        groups = asyncio.run(one.parts.collector.collect(1)).groups
    finally:
        asyncio.run(one.close())
    tensors, described = pack_groups(groups)
    back = unpack_groups(tensors, json.loads(json.dumps(described)))
    assert len({key for key in tensors if key.startswith("pixels.")}) <= 3
    for group, copy in zip(groups, back, strict=True):
        assert (group.draw, group.example, group.step) == (copy.draw, copy.example, copy.step)
        for a, b in zip(group.trajectories, copy.trajectories, strict=True):
            assert (a.token_ids == b.token_ids).all() and (a.logprobs == b.logprobs).all()
            assert (a.trainable == b.trainable).all() and torch.equal(a.positions, b.positions)
            assert (a.version, a.advantage, a.facts) == (b.version, b.advantage, b.facts)
            for x, y in zip(a.images, b.images, strict=True):
                assert (x.start, x.end, x.image) == (y.start, y.end, y.image)
                assert torch.equal(x.image.pixel_values, y.image.pixel_values)
    assert unpack_groups({}, []) == []
