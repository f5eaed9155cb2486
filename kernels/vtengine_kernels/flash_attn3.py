"""flash-attn 3 over paged keys and values, where it is installed: float16 and bfloat16 on Hopper.

Its pages may have any size, its page table is ours but for the integers' width, and it keeps nothing between calls, so
that it may be captured in a CUDA graph. flash-attn 2 takes pages of 256 tokens and up only, which these are not.
API: `flash_attn_with_kvcache` of flash-attention/hopper/flash_attn_interface.py.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def missing() -> str | None:
    """Why it cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if torch.cuda.get_device_capability()[0] != 9:
        return f"{torch.cuda.get_device_name()} is no Hopper GPU (compute capability 9)"
    if _function() is None:
        return "flash-attn 3 is not installed (flash_attn_interface, built from flash-attention/hopper)"
    return None


def takes(keys: Tensor) -> bool:
    size = keys.shape[3]
    return keys.is_cuda and keys.dtype in (torch.float16, torch.bfloat16) and size % 8 == 0 and size <= 256


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float,
) -> Tensor:
    """q [T, Hq, D] of rows that begin at offsets [N + 1], at most `longest` tokens each, the last of lengths -> as q.

    keys, values [pages, page_size, Hkv, D], tables [N, P]; causal within a row.
    """
    function = _function()
    assert function is not None
    out: Tensor = function(
        q,
        keys,
        values,
        cache_seqlens=lengths.int(),
        page_table=tables.int(),
        cu_seqlens_q=offsets.int(),
        max_seqlen_q=longest,
        softmax_scale=scale,
        causal=True,
    )
    return out


@functools.cache
def _function() -> Callable[..., Any] | None:
    try:
        return importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    except (ImportError, AttributeError):
        return None
