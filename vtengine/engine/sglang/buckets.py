"""Tensors in buckets: one flat tensor of bytes for many small ones, and its way to another process."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing import get_sharing_strategy, set_sharing_strategy

if TYPE_CHECKING:
    from torch import Tensor

Named = tuple[str, "Tensor"]


def in_buckets(named: Iterable[Named], max_bytes: int) -> Iterator[list[Named]]:
    """In order; a bucket is at most max_bytes large, unless it is one tensor that is larger, and of one dtype: SGLang
    views parts of it as tensors, which must be aligned."""
    bucket: list[Named] = []
    room = max_bytes
    for name, tensor in named:
        size = tensor.numel() * tensor.element_size()
        if bucket and (size > room or tensor.dtype != bucket[-1][1].dtype):
            yield bucket
            bucket, room = [], max_bytes
        bucket.append((name, tensor))
        room -= size
    if bucket:
        yield bucket


def flatten(bucket: Sequence[Named]) -> dict[str, Any]:
    """SGLang's "flattened_bucket": one uint8 tensor, and where in it each tensor lies (in bytes)."""
    parts = [tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in bucket]
    metadata, start = [], 0
    for (name, tensor), part in zip(bucket, parts, strict=True):
        place = {"start_idx": start, "end_idx": start + part.numel(), "numel": part.numel()}
        metadata.append(SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, **place))
        start += part.numel()
    return {"flattened_tensor": torch.cat(parts), "metadata": metadata}


def serialize(bucket: dict[str, Any], to_child: bool) -> bytes:
    """A handle on the bucket's memory (shared memory, CUDA IPC), not its contents: the bucket must outlive the update.

    SGLang unpickles it with an allow list. to_child: the reader descends from this process; another one cannot ask it
    for file descriptors, so the shared memory gets a name.
    """
    strategy = get_sharing_strategy()
    if not to_child:
        set_sharing_strategy("file_system")
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(bucket)
        return buffer.getvalue()
    finally:
        set_sharing_strategy(strategy)
