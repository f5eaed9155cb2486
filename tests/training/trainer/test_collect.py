"""Rollouts of a step: what is dropped and why, what is kept for the next one."""

from __future__ import annotations

import asyncio
import json
import math

import pytest
from vtengine_training.rewards.base import Score
from vtengine_training.rewards.user import UserReward
from vtengine_training.trainer.loop import Run

from tests.training.trainer.toy import LowBytes, rewarder
from vtengine.engine.base import RequestRejected


@pytest.fixture
def collector(make_config):
    made = []

    def make(function=None, **changes):
        one = Run(make_config(**changes), rewarder(function))
        made.append(one)
        return one.parts.collector

    yield make
    for one in made:
        asyncio.run(one.close())


def collect(one, step=1, keep_rows=False):
    return asyncio.run(one.collect(step, keep_rows))


class Reward:
    """`of(example, how many were asked before)`."""

    def __init__(self, of) -> None:
        self.of, self.asked = of, 0

    async def score(self, episode, example):
        self.asked += 1
        return self.of(example, self.asked)


def test_groups_have_siblings_in_order_with_advantages_that_cancel(collector) -> None:
    found = collect(collector())
    assert len(found.groups) == 2
    for group in found.groups:
        assert len(group.trajectories) == 4
        assert sum(one.advantage for one in group.trajectories) == pytest.approx(0, abs=1e-5)
        for one in group.trajectories:
            assert one.num_trainable == one.facts["response_length"] > 0
            assert one.positions.shape == (3, len(one))
            assert (one.logprobs[one.trainable] < 0).all() and (one.logprobs[~one.trainable] == 0).all()


def test_zero_spread_is_dropped_and_refilled_up_to_the_bound(collector) -> None:
    one = collector(Reward(lambda example, asked: Score(1.0, 0.5)), rollout={"max_refill": 3.0})
    found = collect(one)
    assert found.groups == []
    assert found.counts["drawn"] == found.counts["zero_spread"] == 6
    assert one.sampler.drawn == 6


def test_a_refill_allows_for_what_the_step_has_had_to_drop(collector, monkeypatch) -> None:
    """Two of five examples have spread: ten prompts give four groups, so 6 x 11 / 5 are drawn for the other six."""
    one = collector(
        Reward(lambda example, asked: Score(asked % 2 if example.id in ("q1", "q3") else 1.0, 0.0)),
        rollout={"prompts": 10, "max_refill": 9.0},
    )
    wave, sizes = one._wave, []
    monkeypatch.setattr(one, "_wave", lambda count, *rest: sizes.append(count) or wave(count, *rest))
    found = collect(one)
    assert sizes[:2] == [10, 14] and len(sizes) == found.counts["waves"] <= 3
    assert len(found.groups) == 10


def test_surplus_is_used_first_and_old_surplus_is_dropped(collector) -> None:
    one = collector(rollout={"oversample": 3.0, "max_refill": 9.0})
    first = collect(one, 1)
    kept = list(one.leftover)
    assert first.counts["surplus"] == len(kept) > 0
    second = collect(one, 2)
    assert second.groups[: len(kept)] == kept[:2]
    assert second.counts["reused"] == min(2, len(kept))
    one.leftover = kept
    third = collect(one, 9)
    assert third.counts["stale"] == len(kept)
    assert not set(map(id, kept)) & set(map(id, third.groups))


@pytest.mark.parametrize("fault", ["raises", "nan", "no verdict", "infinite format"])
def test_a_reward_that_fails_drops_the_group_and_nothing_else(collector, fault, caplog) -> None:
    def of(example, asked):
        if example.id == "q1":
            if fault == "raises":
                raise RuntimeError("boom")
            return {
                "nan": Score(math.nan, 0.0),
                "no verdict": Score(None, 0.5),
                "infinite format": Score(1.0, math.inf),
            }[fault]
        return Score(asked % 2, 0.0)

    one = collector(Reward(of), rollout={"prompts": 5, "max_refill": 3.0})
    found = collect(one)
    assert found.counts["reward_failed"] >= 1
    assert len(found.groups) == 5
    assert all(one.dataset.examples[group.example].id != "q1" for group in found.groups)
    assert caplog.text.count("boom") == (fault == "raises")


def test_a_reward_that_never_returns_drops_its_group_once_its_time_is_up(collector, caplog) -> None:
    one = collector(UserReward("tests.training.rewards.rewards_of_users:never", timeout_s=0.2))
    found = collect(one)
    assert found.groups == [] and found.counts["reward_failed"] == found.counts["drawn"] > 0
    assert caplog.text.count("no result within reward.timeout_s = 0.2") == 1


def test_unreadable_images_are_quarantined_and_counted(collector, tiny_data, tmp_path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    rows = [row | {"image": str(tiny_data.parent / row["image"])} for row in rows]
    rows[0]["image"], rows[1]["image"] = "broken.png", "absent.png"
    for row in rows[2:]:
        name = row["image"].rpartition("/")[2]
        (tmp_path / name).write_bytes((tiny_data.parent / name).read_bytes())
        row["image"] = name
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = collector(data={"files": [str(path)]}, rollout={"prompts": 5, "max_refill": 3.0})
    found = collect(one)
    assert found.counts["quarantined"] == 2
    assert one.sampler.quarantined == {0, 1}
    assert {group.example for group in found.groups} <= {2, 3, 4}
    assert collect(one, 2).counts["quarantined"] == 0


def test_words_that_differ_each_time_are_said_once_an_example(collector, caplog) -> None:
    def of(example, asked):
        raise ValueError(f"boom {asked}")

    one = collector(Reward(of), rollout={"max_refill": 3.0})
    collect(one)
    assert one.sampler.drawn == 6 and caplog.text.count("boom") == 5  # of the five examples one was drawn twice


def test_of_words_that_differ_with_each_example_only_the_first_are_said(collector, caplog, monkeypatch) -> None:
    monkeypatch.setattr("vtengine_training.errors.Once.SHOWN", 3)

    def of(example, asked):
        raise ValueError(f"boom of {example.id}")

    collect(collector(Reward(of), rollout={"max_refill": 3.0}))
    assert caplog.text.count("boom") == 3


def refuse(one, monkeypatch, rejection):
    """The engine refuses what it is asked about q1."""
    generate = one.setting.backend.generate
    words = tuple(one.setting.tokenizer.encode_untrusted("1?"))

    async def refusing(request, on_tokens=None):
        ids = request.token_ids
        if any(ids[k : k + len(words)] == words for k in range(len(ids))):
            raise rejection
        return await generate(request, on_tokens)

    monkeypatch.setattr(one.setting.backend, "generate", refusing)


@pytest.mark.parametrize(
    ("code", "blame", "reason"),
    [
        ("request_too_large", "request", "quarantined"),
        ("text_spells_marker", "request", "quarantined"),
        ("refused_by_server", "unclear", "failed"),
    ],
)
def test_a_refusal_costs_an_example_its_place_only_if_it_is_to_blame(
    collector, monkeypatch, caplog, code, blame, reason
) -> None:
    one = collector(rollout={"prompts": 5, "max_refill": 2.0})
    refuse(one, monkeypatch, RequestRejected(code, "no", blame))
    found = collect(one)
    assert found.counts[reason] >= 1
    assert caplog.text.count("dropped, as are others like it: refused_by_server: no") == (reason == "failed")
    assert one.sampler.quarantined == ({1} if blame == "request" else set())
    assert {group.example for group in found.groups} == {0, 2, 3, 4}


@pytest.mark.parametrize("code", ["invalid_sampling", "duplicate_request", "pixels_not_exact", "not_authorized"])
def test_a_refusal_that_the_setup_is_to_blame_for_ends_the_run_and_quarantines_nothing(
    collector, monkeypatch, code
) -> None:
    one = collector(rollout={"prompts": 5, "max_refill": 2.0})
    refuse(one, monkeypatch, RequestRejected(code, "here is why", "setup"))
    with pytest.raises(ValueError, match=f"no example can be asked: {code}: here is why"):
        collect(one)
    assert one.sampler.quarantined == set()


def test_every_image_unreadable_is_an_error(collector, tmp_path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"image": "absent.png", "question": "?", "answer": "1"}) + "\n")
    with pytest.raises(ValueError, match="all 1 examples are in quarantine"):
        collect(collector(data={"files": [str(path)]}))


def test_siblings_differ_and_epochs_differ_but_runs_do_not(collector) -> None:
    def texts(one, step):
        return [t.token_ids.tolist() for group in collect(one, step).groups for t in group.trajectories]

    first, second = collector(), collector()
    a, b = texts(first, 1), texts(second, 1)
    assert a == b
    assert len(set(map(tuple, a))) == len(a)
    later = [ids for step in range(2, 6) for ids in texts(first, step)]  # the same five questions again
    assert not set(map(tuple, a)) & set(map(tuple, later))


def test_rows_for_the_viewer(collector) -> None:
    found = collect(collector(), keep_rows=True)
    assert len(found.rows) == 4 * found.counts["drawn"]
    row = found.rows[0]
    assert {"id", "turns", "reward", "advantage", "accuracy", "expected", "correct", "image_path"} <= row.keys()
    assert row["needs_high"] in (True, False)


@pytest.mark.parametrize("own", [True, False])
def test_rows_say_what_each_turn_is_credited_with(collector, own) -> None:
    one = collector(loss={"turn_advantages": own})
    found = collect(one, keep_rows=True)
    rows = {(row["draw"], row["sample"]): row for row in found.rows}
    for group in found.groups:
        for number, trajectory in enumerate(group.trajectories):
            row = rows[group.draw, number]
            assert row["advantage"] == trajectory.advantage
            credited = [turn["advantage"] for turn in row["turns"] if "advantage" in turn]
            assert tuple(credited) == trajectory.turn_advantages and len(credited) == own * len(row["turns"])


def test_concurrency_changes_nothing(collector) -> None:
    one, many = collector(LowBytes(), rollout={"concurrency": 1}), collector(LowBytes(), rollout={"concurrency": 8})
    for a, b in zip(collect(one).groups, collect(many).groups, strict=True):
        assert (a.draw, a.example) == (b.draw, b.example)
        assert [t.token_ids.tolist() for t in a.trajectories] == [t.token_ids.tolist() for t in b.trajectories]


def test_a_slow_judge_does_not_hold_up_the_engine(collector) -> None:
    """One episode at a time in the engine, and yet several verdicts under way; groups are as without the wait."""
    active, most = 0, 0

    class Slow(LowBytes):
        async def score(self, episode, example):
            nonlocal active, most
            active += 1
            most = max(most, active)
            await asyncio.sleep(0.2)
            active -= 1
            return await super().score(episode, example)

    slow, fast = collector(Slow(), rollout={"concurrency": 1}), collector(rollout={"concurrency": 1})
    for a, b in zip(collect(slow).groups, collect(fast).groups, strict=True):
        assert [t.token_ids.tolist() for t in a.trajectories] == [t.token_ids.tolist() for t in b.trajectories]
        assert [t.advantage for t in a.trajectories] == [t.advantage for t in b.trajectories]
    assert most > 1


def test_cancelling_a_step_leaves_nothing_running(collector) -> None:
    class Never:
        async def score(self, episode, example):
            await asyncio.sleep(1000)

    async def cancelled(one) -> set[asyncio.Task]:
        task = asyncio.create_task(one.collect(1))
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(cancelled(collector(Never()))) == set()
