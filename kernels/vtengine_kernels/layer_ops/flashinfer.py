"""FlashInfer's gate, where it is installed: float16 and bfloat16 on CUDA, in inference mode, one pass over memory.

Its input is ours, gate and up in one tensor. API: `silu_and_mul` of flashinfer/activation.py. Its kernel reads both in
pieces of 16 bytes (include/flashinfer/activation.cuh), and versions before its pull request 5013 fault where `up`
begins between two of them, as in the vision tower of Qwen2.5-VL (3420 numbers).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from vtengine_kernels.flashinfer_paged import missing

PIECE_BYTES = 16

__all__ = ["missing", "swiglu", "takes"]


def takes(x: Tensor) -> bool:
    """Whether tensors of this kind are implemented, and nobody will ask for gradients."""
    is_aligned = x.shape[1] // 2 * x.element_size() % PIECE_BYTES == 0
    is_16_bits = x.dtype in (torch.float16, torch.bfloat16)
    return x.is_cuda and is_16_bits and is_aligned and torch.is_inference_mode_enabled()


def swiglu(x: Tensor) -> Tensor:
    """Contract: the package's docstring."""
    return _silu_and_mul()(x.contiguous()) if len(x) else x[:, : x.shape[1] // 2]


@functools.cache
def _silu_and_mul() -> Callable[[Tensor], Tensor]:
    function: Callable[[Tensor], Tensor] = importlib.import_module("flashinfer").silu_and_mul
    return function
