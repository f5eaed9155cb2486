"""The format table: each condition alone, whole episodes, and the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from vtengine_training.rewards.format import (
    CONDITIONS,
    FORMAT_REWARD,
    broken_conditions,
    conditions_table,
    format_reward,
)

from tests.training.rewards.episodes import CALL, direct, episode, upscaled

GOOD = "<think>t</think><answer>4</answer>"
TABLE = [
    ((GOOD,), ()),
    (("<think>t</think>\n  <answer>4</answer>\n",), ()),
    (("<think>t</think> so <answer>4</answer>",), ()),
    ((f"<think>t</think>{CALL}", GOOD), ()),
    (("<answer>4</answer>",), ("one_thought",)),
    (("<think>t</think><think>u</think><answer>4</answer>",), ("one_thought",)),
    (("hm <think>t</think><answer>4</answer>",), ("thought_first",)),
    (("<think>an <answer> tag</think><answer>4</answer>",), ("clean_thought",)),
    (("<think>t</think><answer>4</answer> indeed",), ("nothing_after",)),
    (("<think>t</think><answer> </answer>",), ("answered", "calls_then_answer", "answer_not_empty")),
    (("<think>t</think>4",), ("answered", "calls_then_answer", "answer_not_empty")),
    (("<think>t</think><answer>4</answer><answer>5</answer>",), ("answered", "calls_then_answer", "answer_not_empty")),
    ((f"<think>t</think>{CALL}", f"<think>t</think>{CALL}"), ("answered", "calls_then_answer", "answer_not_empty")),
    ((CALL, GOOD), ("one_thought",)),
    ((f"<think>t</think>{CALL}", "<answer>4</answer>"), ("one_thought",)),
    (("<think>t</think><tool_call>{}</tool_call>",), ("answered", "calls_then_answer", "answer_not_empty")),
]


@pytest.mark.parametrize(("replies", "broken"), TABLE)
def test_table(replies, broken):
    found = episode(*replies)
    assert broken_conditions(found) == broken
    assert format_reward(found) == (0.0 if broken else FORMAT_REWARD)


def test_a_cut_reply_earns_nothing():
    assert "ended_by_model" in broken_conditions(episode(GOOD, finish="length"))


def test_a_denied_call_is_well_formed():
    asks_twice = f"<think>t</think>{CALL}"
    assert broken_conditions(episode(asks_twice, asks_twice, GOOD, max_turns=3)) == ()


def test_every_condition_can_break_and_hold():
    assert format_reward(direct("4")) == format_reward(upscaled("4")) == FORMAT_REWARD
    broken = {name for _, names in TABLE for name in names} | {"ended_by_model"}
    assert broken == {condition.name for condition in CONDITIONS}


def test_the_page_shows_the_table():
    page = Path(__file__).parents[3] / "docs" / "rewards.md"
    assert conditions_table() in page.read_text(encoding="utf-8")
