"""The Triton implementation, for rows with and without siblings (kernels: `split`).

Runs on the CPU too, under TRITON_INTERPRET=1 (set before triton is imported).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.prefix_attention import split
from vtengine_kernels.prefix_attention.siblings import Siblings
from vtengine_kernels.triton_runtime import interpreted, missing

__all__ = ["interpreted", "missing", "prefix_attention", "takes"]


def takes(keys: Tensor) -> bool:
    return (keys.is_cuda or interpreted()) and keys.dtype != torch.float64


def prefix_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    siblings: Siblings | None = None,
) -> Tensor:
    """Contract: the package's docstring. All on one device; float16, bfloat16 or float32."""
    work = None if siblings is None else siblings.work
    if siblings is not None and work is None:
        work = split.work(siblings, lengths.cpu().numpy(), q.device)
    return split.split_attention(q, keys, values, tables, lengths, scale, work)
