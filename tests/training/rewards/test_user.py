"""User rewards: one signature, loaded by dotted path; what goes wrong names the function."""

from __future__ import annotations

import asyncio
import sys

import pytest
from vtengine_training.rewards.base import RewardError
from vtengine_training.rewards.rewarder import RewardConfig, Rewarder
from vtengine_training.rewards.user import UserReward, load_function

from tests.training.rewards.episodes import direct, example

HERE = "tests.training.rewards.rewards_of_users"


def score(name, answer="4", timeout_s=60.0):
    return asyncio.run(UserReward(f"{HERE}:{name}", timeout_s).score(direct(answer), example("4")))


@pytest.mark.parametrize(
    ("name", "accuracy"),
    [("half", 0.5), ("right", 1.0), ("later", 1.0), ("of_numpy", 1.0), ("of_numpy_truth", 1.0), ("of_torch", 0.5)],
)
def test_accuracy_is_theirs_and_format_is_ours(name, accuracy):
    found = score(name)
    assert (found.accuracy, found.format) == (accuracy, 0.5)


def test_a_dot_instead_of_the_colon():
    assert load_function(f"{HERE}.half")(None, None) == 0.5


@pytest.mark.parametrize(
    "name", ["raises", "times_out_by_itself", "nan", "infinite", "text", "nothing", "several", "huge", "too_much"]
)
def test_a_bad_value_names_the_function_on_one_line(name):
    with pytest.raises(RewardError, match=rf"reward function {HERE}:{name}: (raised|returned) ") as caught:
        score(name)
    assert "\n" not in str(caught.value) and "e1" not in str(caught.value)  # so that equal reasons are counted as one


def test_one_that_never_returns_is_given_up_on():
    with pytest.raises(RewardError, match=rf"reward function {HERE}:never: no result within reward.timeout_s = 0.1$"):
        score("never", timeout_s=0.1)


def test_waiting_for_what_was_cancelled_elsewhere_is_a_fault_of_the_function_and_ends_no_run():
    with pytest.raises(RewardError, match="waits_for_what_another_cancelled: raised CancelledError"):
        score("waits_for_what_another_cancelled")


def test_a_call_that_is_cancelled_itself_ends():
    async def cancelled():
        call = asyncio.ensure_future(UserReward(f"{HERE}:never", 60.0).score(direct("4"), example("4")))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(cancelled())


@pytest.mark.parametrize(("timeout_s", "lines"), [(0.05, 1), (60.0, 0)])
def test_a_plain_one_that_holds_everything_up_is_named_meanwhile_and_counts(timeout_s, lines, caplog):
    assert score("slow", timeout_s=timeout_s).accuracy == 1.0
    assert len(caplog.messages) == lines
    assert all(f"{HERE}:slow: has not returned for 0.05 s" in words for words in caplog.messages)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("half", "module:name"),
        ("", "module:name"),
        (":half", "module:name"),
        ("no.such.module:half", "PYTHONPATH"),
        (f"{HERE}:nowhere", "has no nowhere"),
        (f"{HERE}:one_argument", "episode, example"),
        (f"{HERE}:no_function", "episode, example"),
    ],
)
def test_a_bad_path_is_refused_at_once(path, says):
    with pytest.raises(ValueError, match=says):
        load_function(path)


def test_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "reward_of_the_folder.py").write_text("def one(episode, example):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as of the installed script
    assert load_function("reward_of_the_folder:one")(None, None) == 1.0
    assert sys.path[0] != str(tmp_path)


def test_through_the_config():
    rewarder = Rewarder(RewardConfig(accuracy="function", function=f"{HERE}:half"))
    assert asyncio.run(rewarder.score(direct("4"), example("4"))).accuracy == 0.5
    assert isinstance(rewarder.function, UserReward) and rewarder.function.timeout_s == RewardConfig().timeout_s
    for seconds in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout_s"):
            RewardConfig(timeout_s=seconds)
    with pytest.raises(ValueError, match="function"):
        RewardConfig(accuracy="function")
    with pytest.raises(ValueError, match="function"):
        RewardConfig(function=f"{HERE}:half")
