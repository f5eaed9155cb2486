"""The global random generators, for code that asks for no seed: dropout, a user's reward function."""

from __future__ import annotations

import random

import numpy as np
import torch

from vtengine.rollout.seeds import derive_seed


def seed_generators(seed: int, *path: int | str) -> None:
    """Python's, NumPy's and torch's (of every device), from a seed and what it is for, as every other seed.

    At the start of every step: a run that goes on draws what it would have drawn, and no state needs to be kept.
    """
    derived = derive_seed(seed, *path)
    random.seed(derived)
    np.random.seed(derived % 2**32)
    torch.manual_seed(derived)
