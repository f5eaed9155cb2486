"""Rollouts of the next step while this one learns: with which weights, and that it is at the same time."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vtengine_training.errors import Refused
from vtengine_training.rewards.base import Score
from vtengine_training.sync.daemon import is_running
from vtengine_training.trainer.command import train
from vtengine_training.trainer.loop import Run
from vtengine_training.trainer.models import build_models
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.rollouts import Rollouts
from vtengine_training.trainer.step import Learner, TrainingDiverged

from tests.training.trainer.test_ranks import close_rows
from tests.training.trainer.test_resume import run_until, saved, timeless
from tests.training.trainer.toy import LowBytes, rewarder
from vtengine.config import ConfigError
from vtengine.engine.embedded import EmbeddedEngine

ONE_AT_A_TIME = {"concurrency": 1, "oversample": 2.0, "max_refill": 6.0}
"""Bit for bit the same whatever the engine's batches would have been."""


def by_hand(config) -> Run:
    """The same steps one thing after the other: the next groups are drawn before what is learned is published."""
    one = Run(config, rewarder())

    async def go() -> None:
        parts = one.parts
        await parts.publisher.publish(0)
        groups = (await parts.collector.collect(1)).groups
        for step in range(1, config.steps + 1):
            later = (await parts.collector.collect(step + 1)).groups if step < config.steps else []
            parts.learner.learn(groups, one.rate(step - 1))
            await parts.publisher.publish(step)
            groups = later
        await one.close()

    asyncio.run(go())
    return one


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 3}}])
def test_a_step_learns_from_what_the_weights_before_the_last_sampled(make_config, tmp_path, changes) -> None:
    config = make_config(steps=4, rollout={"ahead": True, **ONE_AT_A_TIME}, **changes)
    rows = run_until(config, 4)
    expected = by_hand(replace(config, output=str(tmp_path / "by-hand")))
    assert rows[0]["staleness/mean"] == 0 and all(1 <= row["staleness/mean"] <= 2 for row in rows[1:])  # 2: left over
    one = Run(config, rewarder())
    assert one.resume() and one.rollouts.waiting is None
    learned = dict(expected.parts.learner.policy.model.named_parameters())
    for name, parameter in one.parts.learner.policy.model.named_parameters():
        assert torch.equal(parameter, learned[name]), name
    asyncio.run(one.close())


def test_it_is_another_curve_than_without(make_config, tmp_path) -> None:
    """From the second step on: the first one has nothing to be behind."""
    rollout = {"concurrency": 1}  # or the last digit depends on what was sampled beside it
    rows = run_until(make_config(steps=3, rollout={**rollout, "ahead": True}), 3)
    plain = run_until(make_config(steps=3, rollout=rollout, output=str(tmp_path / "plain")), 3)
    ahead, without = ([row["loss"] for row in run] for run in (rows, plain))
    assert ahead[0] == pytest.approx(without[0], abs=1e-6)  # MKL's last digit depends on how the engine stores weights
    assert ahead[2] != pytest.approx(without[2], abs=1e-6)
    assert [row["staleness/mean"] for row in plain] == [0, 0, 0]


class Meets(LowBytes):
    """Scores the rollouts of the second step only once the first one learns."""

    def __init__(self) -> None:
        super().__init__()
        self.learning, self.scoring, self.scored = threading.Event(), threading.Event(), 0

    async def score(self, episode, example) -> Score:
        self.scored += 1
        if self.scored > 8:
            self.scoring.set()
            assert await asyncio.to_thread(self.learning.wait, 60), "nothing learned while this was scored"
        return await super().score(episode, example)


def test_both_happen_at_the_same_time(make_config, monkeypatch) -> None:
    function = Meets()
    one = Run(make_config(steps=2, rollout={"ahead": True, "max_refill": 1.0}), rewarder(function))
    learn, there = one.parts.learner.learn, []

    def slow(groups, rate):
        function.learning.set()
        assert there or function.scoring.wait(60), "nothing was scored while this learned"
        there.append(threading.current_thread() is threading.main_thread())
        return learn(groups, rate)

    monkeypatch.setattr(one.parts.learner, "learn", slow)
    rows = []
    asyncio.run(train(one, rows.append))
    assert function.scored == 16 and there == [False, True]  # the last step has nothing to sample
    assert rows[0]["time/wait"] < rows[0]["time/step"] - rows[0]["time/learn"] + 1e-6
    assert all(row["groups/reward_failed"] == 0 for row in rows)


@pytest.mark.parametrize("stops", [[2], [1, 3]])
def test_resume_equals_uninterrupted(make_config, tmp_path, stops) -> None:
    """What waits is in the checkpoint: groups, what became of the others, the records to be written."""
    whole = make_config(steps=4, rollout={"ahead": True, "dump_every": 1, **ONE_AT_A_TIME})
    parts = replace(whole, output=str(tmp_path / "parts"))
    expected = run_until(whole, 4)
    rows = [row for stop in [*stops, 4] for row in run_until(parts, stop)]
    assert [timeless(row) for row in rows] == [timeless(row) for row in expected]
    assert saved(whole, whole.output)[0] == saved(parts, parts.output)[0]
    for file, content in saved(whole, whole.output)[1].items():
        assert all(torch.equal(value, saved(parts, parts.output)[1][file][key]) for key, value in content.items())
    texts = [
        [path.read_text().count("\n") for path in sorted((tmp_path / run / "rollouts").iterdir())]
        for run in ("run", "parts")
    ]
    assert texts[0] == texts[1] and sum(texts[0]) > 8 and all(texts[0])


def test_what_older_weights_sampled_is_not_computed_again_in_vain(make_config, monkeypatch) -> None:
    """Their ratios refer to what the engine sampled with: a forward pass over them would find nothing that is used."""
    loss, update = {"old_logprobs": "recompute"}, {"minibatch_prompts": 1}
    one = Run(make_config(steps=3, rollout={"ahead": True}, loss=loss, update=update), rewarder())
    learner, passes, rows = one.parts.learner, [], []

    def logprobs(*given):
        passes.append(len(rows))
        return Learner._logprobs(learner, *given)

    monkeypatch.setattr(learner, "_logprobs", logprobs)
    asyncio.run(train(one, rows.append))
    assert passes == [0, 0]  # the first step's two mini-batches: the weights of the moment sampled them
    assert rows[1]["clip_frac"] >= 0 and rows[1]["approx_kl"] != 0


def test_what_waits_is_used_even_if_nothing_is_sampled_ahead_any_more(make_config) -> None:
    config = make_config(steps=3, rollout={"ahead": True})
    run_until(config, 1)
    plain = replace(config, rollout=replace(config.rollout, ahead=False))
    rows = run_until(plain, 3)
    assert [row["staleness/mean"] for row in rows] == [1, 0]


def test_an_older_checkpoint_has_nothing_waiting(make_config) -> None:
    config = make_config(steps=3)
    run_until(config, 1)
    rows = run_until(replace(config, rollout=replace(config.rollout, ahead=True)), 3)
    assert [row["staleness/mean"] for row in rows] == [0, 1]


def test_ranks_sample_ahead_as_one_does(make_config, ranks, tmp_path) -> None:
    """Meetings of rollouts and of learning, at the same time; and a resume with another number of ranks."""
    several = make_config(steps=4, rollout={"ahead": True, "max_refill": 6.0, "oversample": 2.0})
    alone = replace(several, output=str(tmp_path / "alone"))
    expected = run_until(alone, 4)
    found = ranks(several, "curve-2")
    found += run_until(several, 3)
    found += ranks(several, "curve-4")
    close_rows(found, expected, 1e-3)
    assert all(row["staleness/mean"] >= 1 for row in found[1:])


def test_a_failure_on_one_side_waits_for_the_other(make_config, monkeypatch) -> None:
    """Ranks that are still at a meeting of rollouts would wait for one that left it."""
    config = make_config(steps=3, rollout={"ahead": True, "max_refill": 1.0})
    one, ended = Run(config, rewarder()), []
    collect = one.parts.collector.collect

    async def collects(*arguments):
        found = await collect(*arguments)
        await asyncio.sleep(0.2)
        ended.append("rollouts")
        return found

    def diverges(groups, rate):
        raise TrainingDiverged("no finite loss")

    monkeypatch.setattr(one.parts.collector, "collect", collects)
    monkeypatch.setattr(one.parts.learner, "learn", diverges)
    with pytest.raises(TrainingDiverged, match="no finite loss"):
        asyncio.run(train(one, lambda row: None))
    assert ended == ["rollouts", "rollouts"]

    other, learned = Run(config, rewarder()), threading.Event()
    learn, collect = other.parts.learner.learn, other.parts.collector.collect

    def learns(groups, rate):
        found = learn(groups, rate)
        learned.set()
        return found

    async def breaks(step, keep_rows):
        if step == 2:
            raise TypeError("a bug")
        return await collect(step, keep_rows)

    monkeypatch.setattr(other.parts.learner, "learn", learns)
    monkeypatch.setattr(other.parts.collector, "collect", breaks)
    with pytest.raises(TypeError, match="a bug"):
        asyncio.run(train(other, lambda row: None))
    assert learned.is_set()


def test_a_refusal_ends_the_run_after_the_step_that_was_learned_meanwhile(make_config, tmp_path, monkeypatch) -> None:
    """It counts and is saved where that is due; once the cause is gone the run goes on with the same draws."""
    config = make_config(steps=3, rollout={"ahead": True, "concurrency": 1}, checkpoint={"every": 1})
    expected = run_until(replace(config, output=str(tmp_path / "undisturbed"), steps=1), 1)
    one, rows = Run(config, rewarder()), []
    wave, draws = one.parts.collector._wave, {}

    async def refuses(count, step, *rest):
        draws[step] = one.parts.collector.sampler.drawn
        found = await wave(count, step, *rest)
        if step == 2:
            raise Refused("no example can be asked")
        return found

    monkeypatch.setattr(one.parts.collector, "_wave", refuses)
    with pytest.raises(ValueError, match="no example can be asked"):
        asyncio.run(train(one, rows.append))
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected] and one.has_learned
    again = Run(config, rewarder())
    assert again.resume() and (again.step, again.parts.learner.version) == (1, one.parts.learner.version)
    assert again.parts.collector.sampler.drawn == draws[2] and again.rollouts.waiting is None
    asyncio.run(again.close())


def test_what_the_other_ranks_have_not_found_out_is_raised_at_once(monkeypatch) -> None:
    """This rank would else come to the meetings of a step that the others do not get to."""
    rollouts = Rollouts(SimpleNamespace(sampler=SimpleNamespace(drawn=0)), 0)

    async def fails(step):
        raise ValueError("of this rank alone")

    monkeypatch.setattr(rollouts, "_sample", fails)
    with pytest.raises(ValueError, match="of this rank alone"):
        asyncio.run(rollouts.ahead(2, lambda: None))


def test_of_two_failures_neither_is_lost(monkeypatch, caplog) -> None:
    rollouts = Rollouts(SimpleNamespace(sampler=SimpleNamespace(drawn=0)), 0)

    async def refuses(step):
        raise Refused("no example can be asked")

    def diverges():
        raise TrainingDiverged("no finite loss")

    monkeypatch.setattr(rollouts, "_sample", refuses)
    with pytest.raises(ValueError, match="no example can be asked"):
        asyncio.run(rollouts.ahead(2, diverges))
    assert "the learner failed too: TrainingDiverged: no finite loss" in caplog.text


def test_an_interrupt_does_not_wait_for_the_learner(monkeypatch) -> None:
    collector = SimpleNamespace(sampler=SimpleNamespace(drawn=0))
    rollouts, begun, may_end = Rollouts(collector, 0), threading.Event(), threading.Event()
    monkeypatch.setattr(rollouts, "_sample", lambda step: asyncio.sleep(60))

    def learns() -> bool:
        begun.set()
        return may_end.wait(60)

    async def go() -> None:
        step = asyncio.create_task(rollouts.ahead(2, learns))
        await asyncio.to_thread(begun.wait, 60)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(step, 30)
        assert not may_end.is_set() and is_running()

    try:
        asyncio.run(go())
    finally:
        may_end.set()


def test_the_embedded_engine_has_a_copy_stored_for_reading(make_config, monkeypatch) -> None:
    monkeypatch.setattr("vtengine.model.linear.onednn_is_better", lambda weight: False)
    one = Run(make_config(steps=2, rollout={"ahead": True}), rewarder())
    learned = one.parts.learner.policy.model
    assert isinstance(one.parts.engine, EmbeddedEngine) and one.parts.engine.model is not learned
    own = {p.data_ptr() for p in one.parts.engine.model.parameters()}
    assert not own & {p.data_ptr() for p in learned.parameters()}
    first = learned.layers[0].attn.qkv.weight.clone()
    asyncio.run(train(one, lambda row: None))
    copied = one.parts.engine.model.layers[0].attn.qkv.weight
    assert copied.stride(0) == 1 and learned.layers[0].attn.qkv.weight.stride(1) == 1
    assert torch.equal(copied, learned.layers[0].attn.qkv.weight) and not torch.equal(copied, first)


def test_what_does_not_go_together(make_config) -> None:
    with pytest.raises(ConfigError, match="ahead, release_memory"):
        make_config(rollout={"ahead": True, "release_memory": True, "backend": "sglang"})
    with pytest.raises(ValueError, match=r"rollout\.ahead = true: engine and learner would take turns on one GPU"):
        build_models(make_config(rollout={"ahead": True}), None, torch.device("cuda"), (), Ranks())
