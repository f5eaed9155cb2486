"""The whole loop on a tiny random model: reward rises, metrics are there, nothing is learned from nothing."""

from __future__ import annotations

import asyncio

import pytest
import torch
from vtengine_training.rewards.base import Score
from vtengine_training.trainer.command import train
from vtengine_training.trainer.loop import Run

from tests.training.trainer.toy import rewarder

NAMES = (
    *("reward/mean", "reward/accuracy", "reward/format", "reward/penalty", "clip_frac", "entropy", "grad_norm"),
    *("response_length/mean", "upscale/ratio", "visual_tokens/per_question", "groups/zero_spread", "groups/surplus"),
    *("mismatch/kl", "mismatch/abs_diff", "mismatch/max", "time/rollout", "time/learn", "time/step", "lr", "version"),
    "memory/peak_gib",
)


def run(config, function=None):
    rows = []
    one = Run(config, rewarder(function))
    asyncio.run(train(one, rows.append))
    return one, rows


def test_reward_rises(make_config) -> None:
    config = make_config(
        steps=16, rollout={"prompts": 4, "n": 8}, update={"learning_rate": 1e-2}, checkpoint={"every": 100}
    )
    _, rows = run(config)
    rewards = [row["reward/mean"] for row in rows]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_metrics_have_the_names_of_the_field(make_config) -> None:
    _, rows = run(make_config(steps=2, loss={"kl_coef": 0.01, "entropy_coef": 0.001}))
    for row in rows:
        assert set(NAMES) <= set(row)
        assert row["kl"] >= 0
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_trainer_and_engine_agree_on_log_probabilities(make_config) -> None:
    _, rows = run(make_config(steps=2))
    for row in rows:
        assert row["mismatch/max"] < 1e-4
        assert row["clip_frac"] == 0


def test_learning_rate_zero_changes_nothing(make_config) -> None:
    config = make_config(steps=2, update={"learning_rate": 0.0})
    one = Run(config, rewarder())
    before = {name: p.clone() for name, p in one.parts.model.named_parameters()}
    asyncio.run(train(one, lambda figures: None))
    assert one.parts.learner.version == 2
    assert all(torch.equal(before[name], p) for name, p in one.parts.model.named_parameters())


def test_sixteen_bits_over_float32_masters(make_config) -> None:
    one, rows = run(make_config(steps=2, dtype="bfloat16", peak_tflops=1.0))
    assert one.parts.model.dtype == torch.bfloat16
    assert all(weight.dtype == torch.float32 for weight in one.parts.learner.optimizer.master.values())
    assert rows[-1]["updates/skipped"] == 0
    assert rows[-1]["mismatch/abs_diff"] < 0.05
    assert 0 < rows[-1]["mfu"] < 1


def test_validation_is_greedy_and_leaves_training_alone(make_config, tiny_data, tmp_path) -> None:
    validation = {"every": 2, "files": [str(tiny_data)]}
    alone = {"concurrency": 1}
    plain = make_config(rollout=alone)
    validated = make_config(rollout=alone, validation=validation, output=str(tmp_path / "validated"))
    runs = [run(config) for config in (plain, validated)]
    first, second = (one.parts.model.state_dict() for one, _ in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = runs[1][1]
    assert [(row["step"], "val/reward/accuracy" in row) for row in rows] == [
        (0, True),
        (1, False),
        (2, True),
        (3, True),
    ]
    assert rows[0]["val/questions"] == rows[2]["val/questions"] == 5
    assert not any(name.startswith("val/") for row in runs[0][1] for name in row)


def test_questions_left_out_of_a_validation_are_said(make_config, tiny_data, caplog) -> None:
    class Picky:
        async def score(self, episode, example):
            if example.id in ("q1", "q3"):
                raise KeyError("no such column")
            return Score(1.0, 0.0)

    one = Run(make_config(validation={"every": 1, "files": [str(tiny_data)]}), rewarder(Picky()))
    found = asyncio.run(one.validate())
    asyncio.run(one.close())
    assert found["val/questions"] == 3
    assert caplog.messages == ["validation leaves out 2 of 5 questions; example q1: KeyError: 'no such column'"]
