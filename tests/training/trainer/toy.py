"""Rewards that a random model can earn."""

from __future__ import annotations

import random

import numpy as np
import torch
from vtengine_training.data.examples import Example
from vtengine_training.rewards.base import Score
from vtengine_training.rewards.penalty import PenaltyConfig
from vtengine_training.rewards.rewarder import RewardConfig, Rewarder

from vtengine.rollout.episode import Episode


class LowBytes:
    """The share of sampled ids below a bound: easy to earn more of."""

    def __init__(self, bound: int = 64) -> None:
        self.bound = bound

    async def score(self, episode: Episode, example: Example) -> Score:
        ids = [token for turn in episode.turns for token in turn.completion.token_ids]
        return Score(sum(token < self.bound for token in ids) / len(ids), 0.0)


class Drawn:
    """A reward by lot, from every global generator that a user may draw from."""

    async def score(self, episode: Episode, example: Example) -> Score:
        drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
        return Score(sum(drawn) / 3, 0.0)


def rewarder(function=None) -> Rewarder:
    return Rewarder(RewardConfig(PenaltyConfig("off")), function or LowBytes())
