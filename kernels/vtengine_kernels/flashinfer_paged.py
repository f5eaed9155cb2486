"""FlashInfer over paged keys and values, where it is installed: float16 and bfloat16 on CUDA.

Its wrappers take our pages as they are (layout NHD, keys and values apart). `plan` says which pages and rows there are
and `run` computes a layer; a plan serves all layers of a pass, which give it the same tensors. Planning reads lengths
on the host, so it cannot be captured in a CUDA graph.

No impl "auto" takes it: each op lists it after an implementation that takes everything. Where its compiled kernels
(flashinfer-jit-cache) are not installed, the first call of each kind compiles for minutes or fails for want of nvcc,
which only that call can tell, and no measurement says that it would win.
API: docs.flashinfer.ai, BatchDecodeWithPagedKVCacheWrapper and BatchPrefillWithPagedKVCacheWrapper.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

WORKSPACE_BYTES = 128 << 20  # as its documentation recommends


@functools.cache
def missing() -> str | None:
    """Why it cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed: `pip install flashinfer-python`"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than its kernels (compute capability 8.0)"
    return None


def takes(keys: Tensor) -> bool:
    return keys.is_cuda and keys.dtype in (torch.float16, torch.bfloat16) and keys.shape[3] in (64, 128, 256)


class Planned:
    """A wrapper and the tensors that its last plan was made from, kept: they are known again by being the same objects.

    They must not be written to between the layers of a pass.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._shape: tuple[object, ...] | None = None
        self._tensors: tuple[Tensor | None, ...] = ()

    def run(
        self, q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, offsets: Tensor | None,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """q [T, Hq, D] -> as q. offsets [N + 1]: where each row's tokens begin, causal; None: each row is one token."""
        shape, tensors = (q.shape[1:], keys.shape[1:3], q.dtype, scale), (tables, lengths, offsets)
        if self._shape != shape or any(a is not b for a, b in zip(self._tensors, tensors, strict=True)):
            self._plan(q, keys, tables, lengths, offsets, scale)
            self._shape, self._tensors = shape, tensors
        out: Tensor = self._wrapper.run(q.contiguous(), (keys, values))
        return out

    def _plan(
        self, q: Tensor, keys: Tensor, tables: Tensor, lengths: Tensor, offsets: Tensor | None, scale: float
    ) -> None:
        page_size, kv_heads = keys.shape[1:3]
        length = lengths.cpu()
        pages = (length + page_size - 1) // page_size
        begins = torch.cat([pages.new_zeros(1), pages.cumsum(0)]).int()
        used = torch.arange(tables.shape[1]) < pages[:, None]
        indices = tables[used.to(tables.device)].int()
        last = (length - (pages - 1) * page_size).int()
        shape = (q.shape[1], kv_heads, q.shape[2], page_size)
        kinds = {"q_data_type": q.dtype, "kv_data_type": keys.dtype, "sm_scale": scale}
        if offsets is None:
            self._wrapper.plan(begins, indices, last, *shape, **kinds)
        else:
            self._wrapper.plan(offsets.cpu().int(), begins, indices, last, *shape, causal=True, **kinds)


@functools.cache
def planned(kind: str, device: torch.device) -> Planned:
    """kind: "Decode" or "Prefill". One for each device, with a workspace of its own."""
    wrapper = getattr(importlib.import_module("flashinfer"), f"Batch{kind}WithPagedKVCacheWrapper")
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    # for decoding with grouped heads its documentation advises the tensor cores
    return Planned(wrapper(workspace, "NHD", **({"use_tensor_cores": True} if kind == "Decode" else {})))
