"""token_sample: one id of each row of scores, the best one or the one that a random number points at.

An id is drawn by inverting the cumulative distribution in the order of ids, so that a sample depends on its row and its
number and on nothing else. Truncation says which ids take part; they are ranked by score, equal scores by id.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from vtengine_kernels.dispatch import select
from vtengine_kernels.token_sample import native, plain, ref, triton
from vtengine_kernels.token_sample.truncation import Truncation

Impl = Literal["auto", "triton", "cpu", "torch", "ref"]

_IMPLS: dict[str, ModuleType] = {"triton": triton, "cpu": native, "torch": plain, "ref": ref}

__all__ = ["Impl", "Truncation", "token_sample"]


def token_sample(
    scores: Tensor,
    draws: Tensor | None = None,
    temperature: Tensor | None = None,
    truncation: Truncation | None = None,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """scores float32 [N, V] -> (ids int64 [N], their log-probabilities float32 [N], natural logarithms).

    draws None: the best id of each row, the first of equals, and its log-probability in softmax(scores). Else draws
    float64 [N] in [0, 1) and temperature float32 [N] > 0: the first id at which the cumulative softmax(scores /
    temperature) exceeds the draw, over the ids that `truncation` keeps (None: all). The sums that a draw is compared
    with are float64; an id of probability 0 is never drawn. A row with a NaN, with +inf, or with nothing but -inf gets
    some id and NaN.
    "triton": CUDA, V <= 2 ** 18; two launches whose programs read the scores once and a block of them again, seven with
    a truncation; nothing waits for the device. "cpu": C++. "torch", "ref": any device. ValueError: shapes, dtypes or
    devices that do not fit. RuntimeError: `impl` is not available here.
    """
    _check(scores, draws, temperature, truncation)
    module = select("token_sample", impl, _IMPLS, scores)
    ids, logprobs = module.token_sample(scores, draws, temperature, truncation)
    return ids, logprobs


def _check(scores: Tensor, draws: Tensor | None, temperature: Tensor | None, truncation: Truncation | None) -> None:
    if scores.ndim != 2 or not scores.shape[1] or scores.dtype != torch.float32:
        raise ValueError(f"token_sample: scores {list(scores.shape)} {scores.dtype}: must be float32 [N, V], V >= 1")
    if draws is None and temperature is None:
        if truncation is not None:
            raise ValueError("token_sample: truncation without draws: the best id is kept by every one; leave it out")
        return
    if draws is None or temperature is None:
        raise ValueError("token_sample: draws and temperature: give both or neither")
    given = [("draws", torch.float64, draws), ("temperature", torch.float32, temperature)]
    if truncation is not None:
        given.append(("top_k", torch.int64, truncation.top_k))
        given += [(name, torch.float32, getattr(truncation, name)) for name in ("top_p", "min_p")]
    for name, dtype, tensor in given:
        if tensor.shape != scores.shape[:1] or tensor.dtype != dtype or tensor.device != scores.device:
            raise ValueError(
                f"token_sample: {name} {list(tensor.shape)} {tensor.dtype} on {tensor.device}: must be {dtype} "
                f"[{len(scores)}] on {scores.device}"
            )
