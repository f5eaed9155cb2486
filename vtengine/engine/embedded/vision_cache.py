"""Visual features by image content and weight version, bounded in bytes, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FeatureKey = tuple[str, tuple[int, int, int], int]


class VisionCache:
    """Features [V, H] per (content hash, grid, weight version). An entry larger than the bound is not kept.

    Whoever is being prefilled holds its features itself, so eviction never takes them away from a request.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self._entries: OrderedDict[FeatureKey, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def get(self, key: FeatureKey) -> torch.Tensor | None:
        features = self._entries.get(key)
        if features is not None:
            self._entries.move_to_end(key)
            self.num_hits += 1
        return features

    def put(self, key: FeatureKey, features: torch.Tensor) -> None:
        size = features.numel() * features.element_size()
        if size > self.max_bytes or key in self._entries:
            return
        self._entries[key] = features
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.numel() * oldest.element_size()

    def clear(self) -> None:
        self._entries.clear()
        self.num_bytes = 0

    def check_integrity(self) -> None:
        assert self.num_bytes == sum(x.numel() * x.element_size() for x in self._entries.values()) <= self.max_bytes
