"""flash-attn 3, where it is installed (see `flash_attn3`): every row one query token."""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels import flash_attn3
from vtengine_kernels.flash_attn3 import missing, takes

__all__ = ["missing", "prefix_attention", "takes"]


def prefix_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float, siblings: None = None
) -> Tensor:
    """Contract: the package's docstring."""
    del siblings
    offsets = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    return flash_attn3.attend(q, keys, values, tables, lengths, offsets, 1, scale)
