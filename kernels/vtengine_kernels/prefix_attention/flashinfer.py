"""FlashInfer's batched decode, where it is installed (see `flashinfer_paged`)."""

from __future__ import annotations

from torch import Tensor

from vtengine_kernels.flashinfer_paged import missing, planned, takes

__all__ = ["missing", "prefix_attention", "takes"]


def prefix_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float, siblings: None = None
) -> Tensor:
    """Contract: the package's docstring. Not while a CUDA graph is captured."""
    del siblings
    return planned("Decode", q.device).run(q, keys, values, tables, lengths, None, scale)
