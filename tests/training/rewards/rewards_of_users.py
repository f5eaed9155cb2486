"""Reward functions as a user would write them, good and bad."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import torch


def half(episode, example):
    return 0.5


def right(episode, example) -> bool:
    return episode.answer in example.answers


async def later(episode, example) -> float:
    await asyncio.sleep(0)
    return 1.0


async def never(episode, example) -> float:
    await asyncio.Event().wait()
    raise AssertionError


async def times_out_by_itself(episode, example) -> float:
    raise TimeoutError("its own")


def slow(episode, example) -> float:
    time.sleep(0.3)
    return 1.0


def of_numpy(episode, example):
    return np.float32(1)


def of_numpy_truth(episode, example):
    return np.bool_(True)


def of_torch(episode, example):
    return torch.tensor(0.5)


def raises(episode, example):
    raise ZeroDivisionError("oh\nno")


def nan(episode, example):
    return float("nan")


def infinite(episode, example):
    return float("inf")


async def waits_for_what_another_cancelled(episode, example):
    shared = asyncio.ensure_future(asyncio.sleep(60))
    shared.cancel()
    await shared


def text(episode, example):
    return "1"


def nothing(episode, example):
    return None


def several(episode, example):
    return torch.tensor([0.0, 1.0])


def huge(episode, example):
    return 10**400


def too_much(episode, example):
    return 1.5


def one_argument(episode):
    return 1.0


no_function = 3
