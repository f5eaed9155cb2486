"""What vision hands to an engine. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ImageInput:
    """One view of one image, ready for the vision tower.

    pixel_values: [num_patches, 6 patch^2] (full) or [num_patches, 3 patch^2] (compact), float32 or bfloat16,
    merge-window order. content_hash: equal for equal pixels; the key of the feature cache and of the radix tree.
    patch: pixels per side of a patch.
    """

    content_hash: str
    grid_thw: tuple[int, int, int]
    pixel_values: torch.Tensor = field(compare=False, repr=False)
    patch: int = 14

    @property
    def visual_tokens(self) -> int:
        t, h, w = self.grid_thw
        return t * h * w // 4

    @property
    def width(self) -> int:
        """Pixels."""
        return self.grid_thw[2] * self.patch

    @property
    def height(self) -> int:
        """Pixels."""
        return self.grid_thw[1] * self.patch
