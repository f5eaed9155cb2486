"""Rows of scores in C++ (csrc/cpu/token_sample.cpp): float32 on the CPU, a row to a thread."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from vtengine_kernels import library
from vtengine_kernels.token_sample.truncation import Truncation


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "draws", "temperature", "top_k", "top_p", "min_p")),
        *((name, ctypes.c_void_p) for name in ("ids", "logprobs")),
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary", "row_stride")),
        *((name, ctypes.c_int32) for name in ("isa", "num_threads")),
    )


@functools.cache
def missing() -> str | None:
    """Why there is no such function here, or None."""
    return library.missing("vt_token_sample")


def takes(scores: Tensor) -> bool:
    return scores.device.type == "cpu"


def token_sample(
    scores: Tensor,
    draws: Tensor | None,
    temperature: Tensor | None,
    truncation: Truncation | None,
    isa: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Contract: the package's docstring. RuntimeError: this machine lacks `isa` (for tests)."""
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    limits = (None,) * 3 if truncation is None else (truncation.top_k, truncation.top_p, truncation.min_p)
    given = [None if x is None else x.contiguous() for x in (draws, temperature, *limits)]
    ids, logprobs = torch.empty(len(scores), dtype=torch.int64), torch.empty(len(scores))
    args = _Args(
        *(None if x is None else x.data_ptr() for x in (scores, *given, ids, logprobs)),
        *scores.shape,
        scores.stride(0),
        library.ISAS[isa],
        torch.get_num_threads(),
    )
    status = library.load().vt_token_sample(ctypes.byref(args))
    if status:
        raise RuntimeError(f"token_sample: the C++ implementation failed with status {status} (isa {isa})")
    return ids, logprobs
