"""Supervised learning on one's own rows: which replies are taught, as which tokens, with which loss."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
import torch
from vtengine_training.grpo.config import LossConfig
from vtengine_training.trainer.batch import build_batch
from vtengine_training.trainer.command import train
from vtengine_training.trainer.lessons import lessons

from tests.tiny_model import byte_encoder
from tests.training.rewards.episodes import example
from tests.training.trainer.probe import collect
from tests.training.trainer.test_ranks import close_rows
from tests.training.trainer.test_resume import run_until
from vtengine.protocol.conversation import Limits
from vtengine.protocol.profile import load_profile
from vtengine.protocol.reply import parse_reply
from vtengine.rollout.tokenizer import Tokenizer

CALL = '<think>I look.</think><tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
SFT = {"loss": {"algorithm": "sft"}, "rollout": {"prompts": 5, "max_new_tokens": 200, "kv_mib": 32}}


def answered(think: str, answer: str = "4") -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


AT_ONCE, CLOSER = (answered("I look."),), (CALL, answered("I look closer."))


@pytest.mark.parametrize(
    ("fields", "limits", "taught"),
    [
        ({}, Limits(), [AT_ONCE, CLOSER]),
        ({"needs_high": True}, Limits(), [CLOSER]),
        ({"needs_high": 0}, Limits(), [AT_ONCE]),
        ({"needs_high": "yes"}, Limits(), [AT_ONCE, CLOSER]),
        ({"needs_high": True, "think": "Two and two."}, Limits(), [(CALL, answered("Two and two."))]),
        ({"needs_high": True}, Limits(max_turns=1), [AT_ONCE]),
        ({"needs_high": True}, Limits("high"), [AT_ONCE]),
        ({"replies": ["one", "two"], "needs_high": 0, "think": "Two."}, Limits(), [("one", "two")]),
        ({"replies": None, "needs_high": 0}, Limits(), [AT_ONCE]),
        ({"replies": "one"}, Limits(), [()]),
        ({"replies": ["one", 2]}, Limits(), [()]),
    ],
)
def test_what_a_row_teaches(fields, limits, taught) -> None:
    assert lessons(example("4", "four", **fields), load_profile("glance"), limits) == taught


def test_exactly_the_replies_are_trained_in_the_conversation_of_inference(run) -> None:
    """Two views where the high one is asked for; a row without a label has both episodes as siblings."""
    tokenizer, groups = Tokenizer(byte_encoder()), collect(run(**SFT))
    assert sorted(group.example for group in groups) == [0, 1, 2, 3, 4]
    for group in groups:
        (one,) = group.trajectories  # all rows have a label
        said = tokenizer.decode(one.token_ids[one.trainable].tolist())
        answer = answered("I look closer." if group.example % 2 else "I look.", str(group.example))
        assert said == (f"{CALL}<|im_end|>" if group.example % 2 else "") + answer + "<|im_end|>"
        assert len(one.images) == 1 + group.example % 2
        assert (one.token_advantages == 1).all()


def test_replies_of_a_row_are_taught_as_they_are(run, tiny_data, monkeypatch) -> None:
    """Whatever its answer and its label say. They are checked in one reading."""
    read: list[str] = []
    monkeypatch.setattr(
        "vtengine_training.trainer.lessons.parse_reply", lambda *a: read.append(a[0]) or parse_reply(*a)
    )
    row = json.loads(tiny_data.read_text().splitlines()[0]) | {"needs_high": 0, "answer": "5"}
    row["replies"] = [CALL.replace("I look.", "Too small."), answered("Two and two.", "four")]
    file = tiny_data.parent / "written.jsonl"
    file.write_text(json.dumps(row) + "\n")
    changes = SFT | {"rollout": SFT["rollout"] | {"prompts": 1}}
    (group,) = collect(run(data={"files": [str(file)]}, **changes))
    (one,) = group.trajectories
    assert read == row["replies"]
    said = Tokenizer(byte_encoder()).decode(one.token_ids[one.trainable].tolist())
    assert said == "".join(f"{reply}<|im_end|>" for reply in row["replies"]) and len(one.images) == 2


def test_a_row_without_a_label_has_both_as_siblings(run, tiny_data, tmp_path) -> None:
    row = json.loads(tiny_data.read_text().splitlines()[0])
    del row["needs_high"]
    (tiny_data.parent / "unlabelled.jsonl").write_text(json.dumps(row) + "\n")
    changes = SFT | {"rollout": SFT["rollout"] | {"prompts": 1}}
    (group,) = collect(run(data={"files": [str(tiny_data.parent / "unlabelled.jsonl")]}, **changes))
    assert [len(one.images) for one in group.trajectories] == [1, 2]


def test_the_loss_is_the_mean_over_taught_tokens_and_what_was_taught_is_said(run, tiny_data) -> None:
    one = run(steps=150, validation={"every": 150, "files": [str(tiny_data)]}, update={"learning_rate": 4e-3}, **SFT)
    groups, rows = collect(one), []
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    with torch.no_grad():
        logprobs, _ = one.parts.learner.policy.logprobs(build_batch(trajectories, [1.0] * len(trajectories)))
    one.parts.collector.sampler.drawn = 0
    asyncio.run(train(one, rows.append))
    assert rows[1]["loss"] == pytest.approx(-float(logprobs.mean()), rel=1e-5)
    assert rows[-1]["loss"] < 0.1 * rows[1]["loss"]
    assert not {"reward/mean", "staleness/mean", "mismatch/kl", "approx_kl"} & rows[1].keys()
    assert rows[0]["val/status/answered"] == 0 and rows[-1]["val/status/answered"] == 1
    assert rows[-1]["val/upscale/recall"] == 1 and rows[-1]["val/upscale/needless"] == 0


def test_ranks_teach_as_one_does(make_config, ranks, tmp_path) -> None:
    several = make_config(steps=3, **SFT)
    expected = run_until(replace(several, output=str(tmp_path / "alone")), 3)
    close_rows(ranks(several, "curve-3"), expected, 1e-3)


@pytest.mark.parametrize(
    ("row", "changes", "words"),
    [
        ({"answer": "4</answer>"}, {}, "would not be read as it is meant"),
        ({"answer": "4", "think": "<answer>"}, {}, "would not be read as it is meant"),
        ({"answer": "<|im_end|>"}, {}, "a reply spells a special token"),
        ({"answer": "4"}, {"max_new_tokens": 20}, "rollout.max_new_tokens = 20: raise it"),
        ({"answer": "4", "replies": []}, {}, "replies must be a list of texts, at least one"),
        ({"answer": "4", "replies": {"0": "x"}}, {}, "replies must be a list of texts, at least one"),
        ({"answer": "4", "replies": ["just 4"]}, {}, "the reply holds neither an answer nor a call"),
        ({"answer": "4", "replies": [CALL]}, {}, "reply 1 of 1: the last one must answer"),
        (
            {"answer": "4", "replies": [AT_ONCE[0], AT_ONCE[0]]},
            {},
            "reply 1 of 2: all but the last must call for a view",
        ),
        ({"answer": "4", "replies": [CALL, CALL, AT_ONCE[0]]}, {}, "at most 2: raise rollout.max_turns"),
        (
            {"answer": "4", "replies": [CALL, AT_ONCE[0]]},
            {"resolution": "low"},
            'at most 1: rollout.resolution = "adaptive"',
        ),
        ({"answer": "4", "replies": [CALL.replace("resize_image", "zoom"), AT_ONCE[0]]}, {}, "zoom"),
    ],
)
def test_rows_that_cannot_be_taught_are_quarantined(run, tiny_data, caplog, row, changes, words) -> None:
    file = tiny_data.parent / "unfit.jsonl"
    file.write_text("".join(json.dumps({"image": "0.png", "question": "?"} | one) + "\n" for one in (row, row)))
    one = run(data={"files": [str(file)]}, **SFT | {"rollout": SFT["rollout"] | {"prompts": 1} | changes})
    with pytest.raises(ValueError, match="examples are in quarantine"):
        collect(one)
    assert words in caplog.text


@pytest.mark.parametrize(
    "given",
    [{"advantage": "centred"}, {"dual_clip": 3.0}, {"turn_advantages": True}, {"old_logprobs": "recompute"}],
)
def test_what_belongs_to_samples_is_refused(given) -> None:
    with pytest.raises(ValueError, match=f'{next(iter(given))}: algorithm = "sft"'):
        LossConfig(algorithm="sft", **given)
    with pytest.raises(ValueError, match='belongs to algorithm = "sft"'):
        LossConfig(advantage="one")
