"""Penalty forms as tables: the worked examples, literal values, and the budget's controller."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vtengine_training.grpo.advantage import advantages, has_spread
from vtengine_training.rewards.base import Score
from vtengine_training.rewards.penalty import BudgetConfig, BudgetController, PenaltyConfig, apply

PAPER, RELEASED, OFF = PenaltyConfig("paper"), PenaltyConfig("released"), PenaltyConfig("off")


def group(direct_right: int, up_right: int, direct_wrong: int = 0, up_wrong: int = 0) -> tuple[list[Score], list[bool]]:
    right, wrong = Score(1.0, 0.5), Score(0.0, 0.5)
    scores = [right] * (direct_right + up_right) + [wrong] * (direct_wrong + up_wrong)
    upscaled = [False] * direct_right + [True] * up_right + [False] * direct_wrong + [True] * up_wrong
    return scores, upscaled


# (direct right, upscaled right, direct wrong, upscaled wrong) -> total of each of these four kinds
TABLE = [
    # r = 3/16 < theta: the paper favours upscaled answers; the released form makes the two tie.
    (PAPER, (3, 13, 0, 0), (1.4, 1.5, None, None)),
    (RELEASED, (3, 13, 0, 0), (1.4, 1.4, None, None)),
    (OFF, (3, 13, 0, 0), (1.5, 1.5, None, None)),
    # r = 2/12 < theta, with wrong answers: the paper's equation takes from wrong direct answers too.
    (PAPER, (2, 10, 4, 0), (1.4, 1.5, 0.4, None)),
    (PAPER, (2, 10, 0, 4), (1.4, 1.5, None, 0.5)),
    (RELEASED, (2, 10, 2, 2), (1.4, 1.4, 0.5, 0.5)),
    # r = 1/2 >= theta: the two forms agree on correct answers.
    (PAPER, (8, 8, 0, 0), (1.5, 1.4, None, None)),
    (RELEASED, (8, 8, 0, 0), (1.5, 1.4, None, None)),
    (PAPER, (4, 4, 4, 4), (1.5, 1.4, 0.5, 0.4)),
    (RELEASED, (4, 4, 4, 4), (1.5, 1.4, 0.5, 0.5)),
    # r = 0: nothing triggers the released form's second clause; the paper takes from direct answers, all wrong here.
    (RELEASED, (0, 12, 4, 0), (None, 1.4, 0.5, None)),
    (PAPER, (0, 12, 4, 0), (None, 1.5, 0.4, None)),
    # r = theta exactly: 1/5 is not below 0.2.
    (PAPER, (1, 4, 0, 0), (1.5, 1.4, None, None)),
    (RELEASED, (1, 4, 0, 0), (1.5, 1.4, None, None)),
    # all direct, all upscaled, nobody right: no ratio, nobody loses.
    (PAPER, (16, 0, 0, 0), (1.5, None, None, None)),
    (PAPER, (0, 16, 0, 0), (None, 1.5, None, None)),
    (RELEASED, (0, 16, 0, 0), (None, 1.4, None, None)),
    (PAPER, (0, 0, 8, 8), (None, None, 0.5, 0.5)),
    (RELEASED, (0, 0, 8, 8), (None, None, 0.5, 0.5)),
    # theta 0: every upscaled answer loses. theta 1: direct answers lose unless all correct ones are direct.
    (PenaltyConfig("paper", theta=0.0), (0, 12, 4, 0), (None, 1.4, 0.5, None)),
    (PenaltyConfig("paper", theta=1.0), (15, 1, 0, 0), (1.4, 1.5, None, None)),
    (PenaltyConfig("paper", size=0.3), (8, 8, 0, 0), (1.5, 1.2, None, None)),
]


@pytest.mark.parametrize(("config", "counts", "expected"), TABLE)
def test_table(config, counts, expected):
    totals = apply(*group(*counts), config)
    place = 0
    for count, value in zip(counts, expected, strict=True):
        for total in totals[place : place + count]:
            assert total == pytest.approx(value, abs=1e-12)
        place += count
    assert place == len(totals)


# Published arithmetic: (form, counts) -> advantage of a correct direct and a correct upscaled answer.
ADVANTAGES = [
    (PAPER, (3, 13, 0, 0), -2.02, 0.47),
    (PAPER, (8, 8, 0, 0), 0.97, -0.97),
    (RELEASED, (8, 8, 0, 0), 0.97, -0.97),
    (PAPER, (2, 10, 4, 0), 0.386, 0.592),
    (RELEASED, (2, 10, 4, 0), 0.56, 0.56),
]


@pytest.mark.parametrize(("config", "counts", "direct", "upscaled"), ADVANTAGES)
def test_advantages(config, counts, direct, upscaled):
    values = advantages(apply(*group(*counts), config))
    assert values[0] == pytest.approx(direct, abs=6e-3)
    assert values[counts[0]] == pytest.approx(upscaled, abs=6e-3)


def test_the_released_form_drops_an_all_correct_group_below_theta():
    assert not has_spread(apply(*group(3, 13), RELEASED))
    assert has_spread(apply(*group(3, 13), PAPER))


def test_a_missing_verdict_is_refused():
    with pytest.raises(ValueError, match=r"score 1 .* no verdict"):
        apply([Score(1.0, 0.5), Score(None, 0.5)], [False, False], OFF)


def test_group_of_one_and_none():
    assert apply([Score(1.0, 0.5)], [True], PAPER) == [1.5]
    assert apply([], [], PAPER) == []


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.booleans()), max_size=20), st.sampled_from([PAPER, RELEASED]))
def test_nobody_loses_more_than_size_or_gains(rows, config):
    scores = [Score(accuracy, 0.5) for accuracy, _ in rows]
    totals = apply(scores, [up for _, up in rows], config)
    for score, total in zip(scores, totals, strict=True):
        lost = score.accuracy + score.format - total
        assert lost == 0 or lost == pytest.approx(config.size)


def test_budget_charges_visual_tokens():
    config = PenaltyConfig("budget")
    totals = apply(
        [Score(1.0, 0.5), Score(0.0, 0.5), Score(1.0, 0.5)], [True, True, False], config, [1.0, 0.4, 0.0], 0.2
    )
    assert totals == pytest.approx([1.3, 0.42, 1.5])
    with pytest.raises(ValueError, match="visual tokens"):
        apply([Score(1.0, 0.5)], [True], config)


def simulate(config: BudgetConfig, benefit: float, steps: int = 600, rate: float = 1.0) -> list[float]:
    """A policy that climbs its reward: upscaling is worth `benefit` to it and costs the price."""
    controller, logit, ratios = BudgetController(config), 0.0, []
    for _ in range(steps):
        ratio = 1 / (1 + math.exp(-logit))
        ratios.append(ratio)
        price = controller.update(ratio)
        logit += rate * (benefit - price)
        logit = min(max(logit, -6.0), 6.0)
    return ratios


@pytest.mark.parametrize("target", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("benefit", [0.05, 0.15, 0.4])
def test_budget_holds_the_target(target, benefit):
    tail = simulate(BudgetConfig(target=target), benefit)[-100:]
    assert sum(tail) / len(tail) == pytest.approx(target, abs=0.03)
    assert max(tail) - min(tail) < 0.1


def test_budget_is_an_upper_bound_unless_looking_may_be_paid():
    assert simulate(BudgetConfig(target=0.5), benefit=-0.05)[-1] < 0.05
    assert simulate(BudgetConfig(target=0.5, least=-0.3), benefit=-0.05)[-1] == pytest.approx(0.5, abs=0.05)


def test_budget_state_goes_on_where_it_was():
    first = BudgetController(BudgetConfig())
    for ratio in (0.9, 0.1, 0.7):
        first.update(ratio)
    second = BudgetController(BudgetConfig())
    second.load_state_dict(first.state_dict())
    assert [first.update(0.4) for _ in range(5)] == [second.update(0.4) for _ in range(5)]


@pytest.mark.parametrize("state", [{}, {"dual": 1}, {"dual": "x", "price": 1}, {"dual": math.nan, "price": 0.1}])
def test_budget_refuses_another_state(state):
    with pytest.raises(ValueError, match="penalty state"):
        BudgetController(BudgetConfig()).load_state_dict(state)


def test_budget_clips_a_state_from_wider_limits():
    controller = BudgetController(BudgetConfig(most=0.2))
    controller.load_state_dict({"dual": 0.4, "price": 0.4})
    assert controller.price == controller.dual == 0.2


@pytest.mark.parametrize("ratio", [math.nan, -0.1, 1.1])
def test_budget_refuses_what_is_no_ratio(ratio):
    with pytest.raises(ValueError, match="upscale ratio"):
        BudgetController(BudgetConfig()).update(ratio)


@pytest.mark.parametrize("values", [{"target": 2.0}, {"gain": 0.0}, {"start": 0.9}, {"least": 0.1}, {"most": 0.0}])
def test_budget_config_names_the_field(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        BudgetConfig(**values)


@given(st.lists(st.floats(0, 1), max_size=200))
def test_the_price_stays_within_its_limits(ratios):
    controller = BudgetController(BudgetConfig(gain=1.0, damping=10.0))
    for ratio in ratios:
        assert 0.0 <= controller.update(ratio) <= 0.5
