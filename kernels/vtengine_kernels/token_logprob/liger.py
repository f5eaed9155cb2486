"""Liger's scaled cross-entropy for Hopper, where it is installed: product and softmax in one kernel, bfloat16.

It gives every row's own logprob and entropy and takes a slope for each, so rows may be compacted before it and any loss
stand after it: four products. It rounds scores to float16, entropies to bfloat16, and the sum of the weight's gradient
to bfloat16 every 1024 rows. It knows no soft cap, bans or low-rank term, and may compile for seconds at a new number of
rows. No impl "auto" takes it: `ROWS` lists it after what takes everything.
API: `LigerFusedScaledCrossEntropySM90Function` of liger-kernel 0.8.5, liger_kernel/ops/cutedsl.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from vtengine_kernels.token_logprob import ref
from vtengine_kernels.token_logprob.head import Head

NO_TARGET = -100  # an id that marks a row to be left out; there is none among ours


@functools.cache
def missing() -> str | None:
    """Why it cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"{torch.cuda.get_device_name()} is no Hopper GPU (compute capability 9.0)"
    try:
        _function()
    except (ImportError, AttributeError) as error:  # an older liger-kernel has no such module
        return f"Liger's kernels for Hopper are not installed ({error}): `pip install 'liger-kernel[cutedsl]>=0.8.5'`"
    return None


def takes(hidden: Tensor) -> bool:
    return hidden.is_cuda and hidden.dtype == torch.bfloat16


def token_logprob(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Contract: the package's docstring. ValueError: the head has what Liger's has not."""
    for name in ("soft_cap", "banned", "low_rank"):
        if getattr(head, name) is not None:
            raise ValueError(f"head.{name} is set: must be None for impl = 'liger'; the others take it")
    if not len(hidden):
        return ref.token_logprob(hidden, head, targets)
    with torch.cuda.device_of(hidden):
        negative, entropies = _function().apply(
            _aligned(hidden), _aligned(head.weight), targets, head.temperature, NO_TARGET, 1, True
        )
    return -negative, entropies.float()


def _aligned(x: Tensor) -> Tensor:
    """The bulk copies of its kernels begin at multiples of 16 bytes, which it does not check."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


@functools.cache
def _function() -> Any:
    module = importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    return module.LigerFusedScaledCrossEntropySM90Function
