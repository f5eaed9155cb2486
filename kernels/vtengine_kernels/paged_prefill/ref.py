"""The reference: one row at a time, in plain torch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def missing() -> str | None:
    return None


def takes(keys: Tensor) -> bool:
    return True


def paged_prefill(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, offsets: Tensor, longest: int
) -> Tensor:
    """Contract: the package's docstring. Works in the dtype of q."""
    del longest
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = q.shape[1] // keys.shape[2]
    spans = itertools.pairwise(offsets.tolist())
    for row, (length, (begin, end)) in enumerate(zip(lengths.tolist(), spans, strict=True)):
        pages = tables[row, : -(-length // keys.shape[1])]
        k = keys[pages].flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        v = values[pages].flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        scores = torch.einsum("chd,lhd->hcl", q[begin:end], k) * q.shape[2] ** -0.5
        seen = torch.arange(length) <= torch.arange(length - (end - begin), length)[:, None]
        weights = scores.masked_fill(~seen.to(q.device), -torch.inf).softmax(dim=-1)
        out[begin:end] = torch.einsum("hcl,lhd->chd", weights, v)
    return out
