"""FlashInfer's batched prefill, where it is installed (see `flashinfer_paged`)."""

from __future__ import annotations

from torch import Tensor

from vtengine_kernels.flashinfer_paged import missing, planned, takes

__all__ = ["missing", "paged_prefill", "takes"]


def paged_prefill(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, offsets: Tensor, longest: int
) -> Tensor:
    """Contract: the package's docstring."""
    del longest
    return planned("Prefill", q.device).run(q, keys, values, tables, lengths, offsets, q.shape[2] ** -0.5)
