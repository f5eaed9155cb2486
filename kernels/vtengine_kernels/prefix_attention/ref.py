"""The reference: one row at a time, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def missing() -> str | None:
    return None


def takes(keys: Tensor) -> bool:
    return True


def prefix_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float, siblings: object = None
) -> Tensor:
    """Contract: the package's docstring. Works in the dtype of q; siblings make no difference."""
    del siblings
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = q.shape[1] // keys.shape[2]
    for row, length in enumerate(lengths.tolist()):
        pages = tables[row, : -(-length // keys.shape[1])]
        k = keys[pages].flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        v = values[pages].flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        weights = (torch.einsum("hd,lhd->hl", q[row], k) * scale).softmax(dim=-1)
        out[row] = torch.einsum("hl,lhd->hd", weights, v)
    return out
