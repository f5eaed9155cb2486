"""Reward functions of the user, loaded by dotted path.

    def reward(episode: Episode, example: Example) -> float    # or `async def`

returns the accuracy, 0 to 1. Format and penalty are added as for every other reward. It runs on the event loop that
also feeds the engine: what takes long should be `async`, and can then be given up on. Modules are found as `python -m`
finds them: in the current folder, and on PYTHONPATH.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import math
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import SupportsFloat

from vtengine.cli.errors import one_line
from vtengine.rollout.episode import Episode
from vtengine_training.data.examples import Example
from vtengine_training.rewards.base import RewardError, Score, format_reward

log = logging.getLogger(__name__)
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
    """A user's function as a RewardFn. timeout_s: of one call."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path, self.timeout_s = path, timeout_s
        self.function = load_function(path)

    async def score(self, episode: Episode, example: Example) -> Score:
        """Raises RewardError, naming the function, when it raises, returns no reward, or is still awaited after
        timeout_s. A plain function cannot be left: from then on the log says what the run waits for."""
        where = f"reward function {self.path}"
        limit = asyncio.timeout(self.timeout_s)
        try:
            value = self._call(episode, example, where)
            if inspect.isawaitable(value):
                async with limit:
                    value = await value
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # it is this call that was cancelled, not something that the function waited for
            if limit.expired():
                raise RewardError(f"{where}: no result within reward.timeout_s = {self.timeout_s:g}") from None
            raise RewardError(f"{where}: raised {type(error).__name__}: {one_line(error)}") from error
        return Score(_number(value, where), format_reward(episode))

    def _call(self, episode: Episode, example: Example, where: str) -> float | Awaitable[float]:
        words = "%s: has not returned for %g s and holds up the run; make it async, or end it by itself"
        late = threading.Timer(self.timeout_s, log.warning, (words, where, self.timeout_s))
        late.daemon = True
        late.start()
        try:
            return self.function(episode, example)
        finally:
            late.cancel()


def _number(value: object, where: str) -> float:
    """True, False, and scalars of NumPy and torch are numbers too. Raises RewardError."""
    try:
        number = float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):  # such as an array or tensor of several numbers
        number = math.nan
    if not 0 <= number <= 1:
        raise RewardError(f"{where}: returned {one_line(repr(value))}; must be a finite number from 0 to 1")
    return number
