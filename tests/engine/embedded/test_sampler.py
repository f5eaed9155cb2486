"""The sampler against distributions worked out by hand, and its random numbers against chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vtengine.engine.base import SamplingParams
from vtengine.engine.embedded.head_graphs import GraphPlan
from vtengine.engine.embedded.sampler import SamplingPlan, sample, uniforms

PROBS = torch.tensor([0.1, 0.4, 0.2, 0.05, 0.25])
DRAWS = 4000


def draw(count=DRAWS, banned=(), logits=None, **params):
    """`count` draws from PROBS as one batch of different seeds: (frequencies [V], logprob per id)."""
    logits = PROBS.log() if logits is None else logits
    plan = SamplingPlan.build([SamplingParams(**params)] * count, range(count), banned, 5, torch.device("cpu"))
    ids, logprobs = sample(logits.repeat(count, 1), plan, plan.draws(np.zeros(count, dtype=np.uint64)))
    known = {int(i): float(p) for i, p in zip(ids, logprobs, strict=True)}
    return torch.bincount(ids, minlength=5) / count, known


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.05, 0.25]),
        ({"temperature": 0.5}, [0.01, 0.16, 0.04, 0.0025, 0.0625]),
        ({"temperature": 1.0, "top_k": 2}, [0, 0.4, 0, 0, 0.25]),
        ({"temperature": 1.0, "top_k": 10**30}, [0.1, 0.4, 0.2, 0.05, 0.25]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 0.4, 0, 0, 0.25]),
        ({"temperature": 1.0, "top_p": 0.001}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-300, "top_k": 4}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.3}, [0, 0.4, 0.2, 0, 0.25]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0, 0.4, 0, 0, 0.25]),
        ({"temperature": 1.0, "logit_bias": {1: -math.inf}}, [0.1, 0, 0.2, 0.05, 0.25]),
        ({"temperature": 1.0, "logit_bias": {0: math.log(4)}}, [0.4, 0.4, 0.2, 0.05, 0.25]),
    ],
)
def test_frequencies_and_logprobs(params, expected):
    expected = torch.tensor(expected) / sum(expected)
    frequencies, logprobs = draw(**params)
    assert (frequencies[expected == 0] == 0).all()
    assert (frequencies - expected).abs().max() < 4 * 0.5 / math.sqrt(DRAWS)
    for token, logprob in logprobs.items():
        assert logprob == pytest.approx(math.log(expected[token]), abs=1e-5)


def test_what_graphs_are_given_fits_as_well():
    plan = GraphPlan.of([SamplingParams(temperature=1.0, top_k=k) for k in (0, 3, 2**63 - 1)], range(3), 5)
    assert plan.numbers[:, 3].tolist() == [5, 3, 5]


def test_greedy_takes_the_best_and_reports_its_probability():
    frequencies, logprobs = draw(10, temperature=0.0)
    assert frequencies[1] == 1 and logprobs[1] == pytest.approx(math.log(0.4), abs=1e-6)
    frequencies, logprobs = draw(10, temperature=0.0, banned=(1,))
    assert frequencies[4] == 1 and logprobs[4] == pytest.approx(math.log(0.25 / 0.6), abs=1e-6)


def test_a_row_does_not_depend_on_the_others():
    params = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_p=0.9, logit_bias={2: 1.0}),
        SamplingParams(temperature=1.2, top_k=3),
    ]
    logits = torch.randn(4, 5)
    seeds, counters = [3, 4, 5, 2**64 + 6], np.array([0, 7, 2, 9], dtype=np.uint64)
    device = torch.device("cpu")
    plan = SamplingPlan.build(params, seeds, (), 5, device)
    together = sample(logits.clone(), plan, plan.draws(counters))
    for row in range(4):
        plan = SamplingPlan.build(params[row : row + 1], seeds[row : row + 1], (), 5, device)
        alone = sample(logits[row : row + 1].clone(), plan, plan.draws(counters[row : row + 1]))
        assert alone[0][0] == together[0][row]
        assert alone[1][0] == pytest.approx(float(together[1][row]), abs=1e-6)


def test_random_numbers_are_even_and_uncorrelated():
    seeds, counters = np.meshgrid(np.arange(100, dtype=np.uint64), np.arange(100, dtype=np.uint64), indexing="ij")
    numbers = uniforms(seeds.ravel(), counters.ravel()).reshape(100, 100)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert len(np.unique(numbers)) == 10_000
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert np.abs(counts - 1000).max() < 150
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.05


def test_ids_of_probability_zero_are_never_drawn():
    logits = torch.full((5,), -torch.inf)
    logits[3] = 0.0
    frequencies, logprobs = draw(500, temperature=1.0, logits=logits)
    assert frequencies[3] == 1 and logprobs[3] == 0
