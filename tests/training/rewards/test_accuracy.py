"""Who is asked when, what becomes of episodes without an answer, and the rewarder around it."""

from __future__ import annotations

import asyncio

import pytest
from vtengine_training.rewards.accuracy import Accuracy
from vtengine_training.rewards.base import Score
from vtengine_training.rewards.judge.config import JudgeConfig
from vtengine_training.rewards.judge.judge import Judge
from vtengine_training.rewards.penalty import BudgetConfig, PenaltyConfig
from vtengine_training.rewards.rewarder import RewardConfig, Rewarder

from tests.training.rewards.episodes import direct, episode, example, upscaled
from tests.training.rewards.judge_server import honest, serving, status
from vtengine.config import build, to_dict


def score(reward, found, row):
    return asyncio.run(reward.score(found, row))


def judge_config(server, **changes):
    return JudgeConfig(url=server.url, model="tiny", **({"canaries": 0, "backoff_s": 0.0, "attempts": 2} | changes))


def test_rules_alone():
    reward = Accuracy("rules")
    assert score(reward, direct("4"), example("4")) == Score(1.0, 0.5, {"rules/decided": 1.0})
    assert score(reward, direct("5"), example("4")).accuracy == 0.0
    assert score(reward, direct("a pair"), example("two things")) == Score(0.0, 0.5, {"rules/decided": 0.0})


def test_an_episode_without_an_answer_is_wrong():
    found = score(Accuracy("rules"), episode("no tags"), example("4"))
    assert (found.accuracy, found.format) == (0.0, 0.0) and found.detail["format/answered"] == 1.0


@pytest.mark.parametrize("state", ["failed", "rejected"])
def test_an_episode_that_the_engine_broke_has_no_verdict(state):
    broken = direct("4")
    object.__setattr__(broken, "status", state)
    assert score(Accuracy("rules"), broken, example("4")).accuracy is None


def test_the_judge_is_asked_only_where_rules_do_not_decide():
    pytest.importorskip("openai")

    async def run(server):
        reward = Accuracy("rules+judge", Judge(judge_config(server)))
        rows = [("4", "4"), ("5", "4"), ("four", "4"), ("fourteen", "4")]
        found = [(await reward.score(direct(answer), example(reference))).accuracy for answer, reference in rows]
        await reward.judge.close()
        return found

    with serving(honest) as server:
        assert asyncio.run(run(server)) == [1.0, 0.0, 1.0, 0.0]
        assert [asked.candidate for asked in server.asked] == ["four", "fourteen"]


def test_the_judge_sees_the_answer_alone_and_disagreement_is_counted():
    pytest.importorskip("openai")
    thinking = episode("<think>secret thought</think><answer>4</answer>")
    with serving(lambda asked: asked.verdict(False)) as server:

        async def run():
            rewarder = Rewarder(RewardConfig(accuracy="judge", judge=judge_config(server)))
            found = await rewarder.score(thinking, example("4"))
            figures = rewarder.end_step({})
            await rewarder.close()
            return found, figures

        found, figures = asyncio.run(run())
    assert found.accuracy == 0.0 and figures["judge/agrees_with_rules"] == 0.0
    assert "secret" not in server.asked[0].user and server.asked[0].question == "How many chairs are there?"


def test_no_verdict_is_no_score():
    pytest.importorskip("openai")
    with serving(lambda asked: status(500)) as server:
        config = RewardConfig(accuracy="judge", judge=judge_config(server))

        async def run():
            rewarder = Rewarder(config)
            found = await rewarder.score(direct("4"), example("4"))
            with pytest.raises(ValueError, match="no verdict"):
                rewarder.totals([found], [direct("4")])
            figures = rewarder.end_step({})
            await rewarder.close()
            return found, figures

        found, figures = asyncio.run(run())
    assert found.accuracy is None and not found.is_usable and figures["judge/no_verdict"] == 1


def test_a_bad_row_is_named():
    with pytest.raises(ValueError, match="answer_type"):
        score(Accuracy("rules"), direct("4"), example("4", answer_type="numbre"))


def test_totals_and_budget_through_the_rewarder():
    config = RewardConfig(PenaltyConfig("budget", budget=BudgetConfig(target=0.3, start=0.2, gain=0.1, damping=0.0)))
    rewarder = Rewarder(config)
    siblings = [direct("4"), upscaled("4"), upscaled("5")]
    scores = [score(rewarder, one, example("4")) for one in siblings]
    assert rewarder.totals(scores, siblings) == pytest.approx([1.5, 1.3, 0.3])
    figures = rewarder.end_step({})
    assert figures["penalty/price"] == pytest.approx(0.2 + 0.1 * (2 / 3 - 0.3))
    assert rewarder.end_step({"upscale/ratio": 0.3})["penalty/price"] == figures["penalty/price"]
    again = Rewarder(config)
    again.restore(rewarder.state())
    assert again.totals(scores, siblings) == rewarder.totals(scores, siblings)


def test_canaries_are_asked_every_step_and_reported():
    pytest.importorskip("openai")

    async def run(server):
        config = RewardConfig(accuracy="judge", judge=judge_config(server, canaries=3, price_prompt=1.0))
        rewarder = Rewarder(config)
        await rewarder.start()
        steps = []
        for _ in range(3):
            for answer in ("4", "4", "5"):
                await rewarder.score(direct(answer), example("4"))
            await asyncio.gather(*rewarder.judge._canary_tasks)
            steps.append(rewarder.end_step({}))
        state = rewarder.state()
        await rewarder.close()
        return steps, state

    with serving(honest) as server:
        steps, state = asyncio.run(run(server))
    assert [step["judge/canary_right"] for step in steps] == [3.0, 3.0, 3.0]
    assert [step["judge/cache_hits"] for step in steps] == [1.0, 3.0, 3.0]
    assert steps[0]["judge/agrees_with_rules"] == 1.0
    assert steps[0]["judge/cost"] < steps[2]["judge/cost"] == pytest.approx(len(server.asked) * 100 / 1e6)
    assert state["judge"]["totals"]["canary_right"] == 9


def test_config_refuses_what_does_not_go_together():
    with pytest.raises(ValueError, match="model"):
        RewardConfig(accuracy="judge")
    with pytest.raises(ValueError, match="tolerance"):
        RewardConfig(tolerance=2.0)
    with pytest.raises(ValueError, match="theta"):
        PenaltyConfig(theta=-1.0)
    with pytest.raises(ValueError, match="did you mean budget"):
        build(RewardConfig, {"penalty": {"form": "bugdet"}}, "reward.")


def test_config_survives_toml():
    config = RewardConfig(accuracy="judge", judge=JudgeConfig(model="m", extra_body={"top_k": 1}))
    assert build(RewardConfig, to_dict(config)) == config
