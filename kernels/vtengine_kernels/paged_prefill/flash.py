"""flash-attn 3, where it is installed (see `flash_attn3`)."""

from __future__ import annotations

from torch import Tensor

from vtengine_kernels import flash_attn3
from vtengine_kernels.flash_attn3 import missing, takes

__all__ = ["missing", "paged_prefill", "takes"]


def paged_prefill(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, offsets: Tensor, longest: int
) -> Tensor:
    """Contract: the package's docstring."""
    return flash_attn3.attend(q, keys, values, tables, lengths, offsets, longest, q.shape[2] ** -0.5)
