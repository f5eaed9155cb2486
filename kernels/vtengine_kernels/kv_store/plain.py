"""The torch implementation: two indexed copies."""

from __future__ import annotations

from torch import Tensor


def missing() -> str | None:
    return None


def takes(keys: Tensor) -> bool:
    return True


def kv_store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Contract: the package's docstring."""
    keys.flatten(0, 1).index_copy_(0, slots, k)
    values.flatten(0, 1).index_copy_(0, slots, v)
