"""Rows of scores in C++ (csrc/cpu/token_logprob.cpp): float32 on the CPU, each row read once, nothing copied."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from vtengine_kernels import library
from vtengine_kernels.token_logprob.head import Head
from vtengine_kernels.token_logprob.products import over


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "targets", "logprobs", "entropies", "log_sums")),
        *((name, ctypes.c_void_p) for name in ("to_logprob", "to_entropy")),
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary", "row_stride")),
        *((name, ctypes.c_float) for name in ("cold", "cap")),
        *((name, ctypes.c_int32) for name in ("isa", "num_threads")),
    )


@functools.cache
def missing() -> str | None:
    """Why there are no such functions here, or None."""
    return library.missing("vt_token_statistics")


def takes(hidden: Tensor) -> bool:
    """Whether scores of such hidden states are float32 on the CPU."""
    return hidden.device.type == "cpu" and hidden.dtype != torch.float64


def statistics(scores: Tensor, targets: Tensor, head: Head, isa: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """scores [C, V] as the products left them -> float32 [C]: logprobs of the targets, entropies, log-sum-exps."""
    logprobs, entropies, log_sums = torch.empty((3, len(scores)))
    _call("vt_token_statistics", scores, targets, (logprobs, entropies, log_sums), (None, None), head, isa)
    return logprobs, entropies, log_sums


def gradients_(
    scores: Tensor,
    targets: Tensor,
    log_sums: Tensor,
    entropies: Tensor,
    slopes: tuple[Tensor, Tensor],
    head: Head,
    isa: str = "auto",
) -> Tensor:
    """The gradients of scores, over them. slopes: of the loss in logprobs and in entropies, float32 [C] each."""
    _call("vt_token_gradients", scores, targets, (None, entropies, log_sums), slopes, head, isa)
    into = over(scores, head.weight)
    if into.dtype != scores.dtype:
        for narrow, row in zip(into, scores, strict=True):
            narrow.copy_(row.to(into.dtype))
    return into


def _call(
    name: str,
    scores: Tensor,
    targets: Tensor,
    out: tuple[Tensor | None, Tensor, Tensor],
    slopes: tuple[Tensor | None, Tensor | None],
    head: Head,
    isa: str,
) -> None:
    arrays = [scores, targets, *out, *slopes]
    arrays = [array if array is scores or array is None else array.contiguous() for array in arrays]
    args = _Args(
        *(None if array is None else array.data_ptr() for array in arrays),
        scores.shape[0],
        scores.shape[1],
        scores.stride(0),
        1.0 / head.temperature,
        head.soft_cap or 0.0,
        library.ISAS[isa],
        torch.get_num_threads(),
    )
    status = getattr(library.load(), name)(ctypes.byref(args))
    if status:
        raise RuntimeError(f"token_logprob: the C++ implementation failed with status {status} (isa {isa})")
