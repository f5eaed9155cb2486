"""Who learns from which group: the same on all ranks, as equal as can be, and nothing is sent for nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from vtengine_training.trainer.balance import _pack, _unpack, balanced, place
from vtengine_training.trainer.ranks import Ranks

from tests.training.trainer.probe import collect


def loads_of(places, loads, size):
    return [sum(loads[draw][0] for draw, rank in places.items() if rank == one) for one in range(size)]


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_with_most_has_little_more_than_its_share(seed) -> None:
    rng, size = random.Random(seed), 8
    loads = {draw: (rng.randint(500, 1500), draw % size) for draw in rng.sample(range(64), 32)}
    places = place(loads, size)
    assert places.keys() == loads.keys()
    found = loads_of(places, loads, size)
    assert max(found) <= min(found) + 1500
    assert max(found) <= 1.15 * sum(found) / size
    assert place(dict(sorted(loads.items(), key=lambda _: rng.random())), size) == places


def test_nothing_moves_for_nothing() -> None:
    even = {0: (10, 0), 1: (10, 1), 2: (7, 0), 3: (7, 1)}
    assert place(even, 2) == {0: 0, 1: 1, 2: 0, 3: 1}
    crossed = {0: (10, 1), 1: (9, 0)}  # one each, whoever
    assert place(crossed, 2) == {0: 1, 1: 0}
    assert place({0: (10, 2), 1: (9, 2), 2: (1, 2)}, 3) == {0: 2, 1: 0, 2: 1}
    assert place({}, 2) == {}


def test_groups_arrive_as_they_left(run) -> None:
    groups = collect(run())
    back = _unpack(_pack(groups))
    assert _unpack(_pack([])) == []
    for one, other in zip(groups, back, strict=True):
        assert (one.draw, one.example, one.step) == (other.draw, other.example, other.step)
        for left, right in zip(one.trajectories, other.trajectories, strict=True):
            assert np.array_equal(left.token_ids, right.token_ids) and np.array_equal(left.logprobs, right.logprobs)
            assert torch.equal(left.images[0].image.pixel_values, right.images[0].image.pixel_values)
            assert left.advantage == right.advantage and left.facts == right.facts


def test_one_process_keeps_all(run) -> None:
    groups = collect(run())
    assert balanced(groups, [[group.draw for group in groups]], Ranks(), share_prefix=True) == groups
