"""Reward functions of the user, loaded by dotted path.

    def reward(episode: Episode, example: Example) -> float    # or `async def`

returns the accuracy, 0 to 1. Format and penalty are added as for every other reward. It runs on the event loop that
also feeds the engine: what takes long should be `async`. Modules are found as `python -m` finds them: in the current
folder, and on PYTHONPATH.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Awaitable, Callable
from typing import SupportsFloat

from vtengine.cli.errors import one_line
from vtengine.rollout.episode import Episode
from vtengine_training.data.examples import Example
from vtengine_training.rewards.base import RewardError, Score, format_reward

Function = Callable[[Episode, Example], float | Awaitable[float]]


def load_function(path: str) -> Function:
    """The function at `package.module:name`. Raises ValueError naming the path and what to change."""
    module_name, colon, name = path.partition(":")
    if not colon:
        module_name, _, name = path.rpartition(".")
    if not module_name or not name:
        raise ValueError(f"reward.function = {path!r}: must look like package.module:name")
    if os.getcwd() not in sys.path:  # the installed script's path begins with its own folder
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # it is the user's code
        hint = (
            "is it in this folder, or on PYTHONPATH?"
            if isinstance(error, ImportError)
            else f"{type(error).__name__} in its own code"
        )
        raise ValueError(f"reward.function = {path!r}: cannot import {module_name}: {error}; {hint}") from error
    found = getattr(module, name, None)
    if found is None:
        raise ValueError(f"reward.function = {path!r}: {module_name} has no {name}")
    try:
        inspect.signature(found).bind(None, None)
    except (TypeError, ValueError):
        raise ValueError(f"reward.function = {path!r}: must be a function (episode, example) -> float") from None
    return found  # type: ignore[no-any-return]


class UserReward:
    """A user's function as a RewardFn."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.function = load_function(path)

    async def score(self, episode: Episode, example: Example) -> Score:
        """Raises RewardError, naming the function, when it raises or returns no reward."""
        where = f"reward function {self.path}"
        try:
            value = self.function(episode, example)
            if inspect.isawaitable(value):
                value = await value
        except (Exception, SystemExit) as error:
            raise RewardError(f"{where}: raised {type(error).__name__}: {one_line(error)}") from error
        return Score(_number(value, where), format_reward(episode))


def _number(value: object, where: str) -> float:
    """True, False, and scalars of NumPy and torch are numbers too. Raises RewardError."""
    try:
        number = float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):  # such as an array or tensor of several numbers
        number = math.nan
    if not 0 <= number <= 1:
        raise RewardError(f"{where}: returned {one_line(repr(value))}; must be a finite number from 0 to 1")
    return number
