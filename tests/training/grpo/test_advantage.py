"""Advantages against numpy, and the weights of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vtengine_training.grpo.advantage import TurnRewards, advantages, deviation, has_spread, turn_advantages
from vtengine_training.grpo.weights import token_weights

from tests.training.grpo.reference import reference_advantages

KINDS = ("standardised", "centred", "leave-one-out")
REWARDS = st.lists(st.floats(-2, 2).map(lambda x: round(x, 3)), min_size=2, max_size=16)


@pytest.mark.parametrize("kind", KINDS)
@given(rewards=REWARDS)
def test_against_numpy(kind, rewards) -> None:
    expected = reference_advantages(rewards, kind)
    np.testing.assert_allclose(advantages(rewards, kind), expected, rtol=1e-9, atol=1e-9)


@given(rewards=REWARDS)
def test_they_add_up_to_nothing(rewards) -> None:
    for kind in KINDS:
        assert sum(advantages(rewards, kind)) == pytest.approx(0, abs=1e-6)


def test_spread() -> None:
    assert not has_spread([1.4] * 16)
    assert has_spread([1.5] * 15 + [1.4])
    assert deviation([1.0]) == 0
    assert advantages([1.0]) == [0.0] and advantages([]) == []
    assert deviation([1.0, 3.0]) == pytest.approx(2**0.5)


def test_a_reward_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        advantages([1.0, float("nan")])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=12))
def test_weights_of_a_minibatch_add_up_to_one(sizes) -> None:
    lengths, groups = [length for length, _ in sizes], [group for _, group in sizes]
    expected = 1.0 if any(lengths) else 0.0
    for kind in ("sequence-mean", "token-mean", "prompt-mean"):
        weights = token_weights(lengths, groups, kind, 10)
        assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(expected)
    weights = token_weights(lengths, groups, "constant", 10)
    total = sum(w * n for w, n in zip(weights, lengths, strict=True))
    assert total == pytest.approx(sum(lengths) / 10 / len(lengths))


def test_by_hand() -> None:
    assert token_weights([2, 6], [0, 0], "sequence-mean", 9) == [1 / 4, 1 / 12]
    assert token_weights([2, 6], [0, 0], "token-mean", 9) == [1 / 8, 1 / 8]
    assert token_weights([2, 6, 4], [0, 0, 1], "prompt-mean", 9) == [1 / 16, 1 / 16, 1 / 8]
    with pytest.raises(ValueError, match="groups"):
        token_weights([1], [], "token-mean", 9)


def test_turns_are_credited_with_their_own_parts() -> None:
    """Two that asked (one right, one wrong), two that answered at once; 0.1 for asking."""
    siblings = [TurnRewards(1, 0.5, 0.1), TurnRewards(0, 0.5, 0.1), TurnRewards(1, 0.0, 0.0), TurnRewards(0, 0.5, 0.0)]
    found = turn_advantages(siblings, [2, 3, 1, 1], "centred")
    assert [len(one) for one in found] == [2, 3, 1, 1]
    asking, answering, whole = (0.9, -0.1, 1.0, 0.0), (1.5, 0.5, 1.0, 0.5), (1.4, 0.4, 1.0, 0.5)
    mean = [sum(part) / 4 for part in (asking, answering, whole)]
    assert found[0] == pytest.approx((0.9 - mean[0], 1.5 - mean[1]))
    assert found[1] == pytest.approx((-0.1 - mean[0], -0.1 - mean[0], 0.5 - mean[1]))
    assert found[2] == pytest.approx((1.0 - mean[2],)) and found[3] == pytest.approx((0.5 - mean[2],))


def test_without_a_second_turn_it_is_the_usual_advantage() -> None:
    siblings = [TurnRewards(float(k % 2), 0.5, 0.0) for k in range(4)]
    assert [one for (one,) in turn_advantages(siblings, [1] * 4)] == advantages([one.whole for one in siblings])
    with pytest.raises(ValueError, match="equally many"):
        turn_advantages(siblings, [1])
