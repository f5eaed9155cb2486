"""token_sample: one id of each row of scores, the best one or the one that a random number points at.

An id is drawn by inverting the cumulative distribution in the order of ids, so that a sample depends on its row and its
number and on nothing else.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from vtengine_kernels.dispatch import select
from vtengine_kernels.token_sample import plain, ref, triton

Impl = Literal["auto", "triton", "torch", "ref"]

_IMPLS: dict[str, ModuleType] = {"triton": triton, "torch": plain, "ref": ref}

__all__ = ["Impl", "token_sample"]


def token_sample(
    scores: Tensor, draws: Tensor | None = None, temperature: Tensor | None = None, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """scores float32 [N, V] -> (ids int64 [N], their log-probabilities float32 [N], natural logarithms).

    draws None: the best id of each row, the first of equals, and its log-probability in softmax(scores). Else draws
    float64 [N] in [0, 1) and temperature float32 [N] > 0: the first id at which the cumulative softmax(scores /
    temperature) exceeds the draw. The sums that a draw is compared with are float64; an id of probability 0 is never
    drawn. A row with a NaN, with +inf, or with nothing but -inf gets some id and NaN.
    "triton": CUDA, two launches whose programs read the scores once and a block of them again. "torch", "ref": any
    device. ValueError: shapes, dtypes or devices that do not fit. RuntimeError: `impl` is not available here.
    """
    _check(scores, draws, temperature)
    ids, logprobs = select("token_sample", impl, _IMPLS, scores).token_sample(scores, draws, temperature)
    return ids, logprobs


def _check(scores: Tensor, draws: Tensor | None, temperature: Tensor | None) -> None:
    if scores.ndim != 2 or not scores.shape[1] or scores.dtype != torch.float32:
        raise ValueError(f"token_sample: scores {list(scores.shape)} {scores.dtype}: must be float32 [N, V], V >= 1")
    if draws is None and temperature is None:
        return
    if draws is None or temperature is None:
        raise ValueError("token_sample: draws and temperature: give both or neither")
    for name, dtype, given in (("draws", torch.float64, draws), ("temperature", torch.float32, temperature)):
        if given.shape != scores.shape[:1] or given.dtype != dtype or given.device != scores.device:
            raise ValueError(
                f"token_sample: {name} {list(given.shape)} {given.dtype} on {given.device}: must be {dtype} "
                f"[{len(scores)}] on {scores.device}"
            )
