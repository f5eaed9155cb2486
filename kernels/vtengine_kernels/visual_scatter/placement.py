"""Which feature stands at which place, and the way back: where each feature is shown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Placement:
    """rows int64 [N]: the feature at each place. order int64 [N]: places by feature, then in order of appearance.

    starts int64 [num_features + 1]: feature f is shown at order[starts[f] : starts[f + 1]].
    """

    rows: Tensor
    order: Tensor
    starts: Tensor
    num_features: int

    @staticmethod
    def of(rows: np.ndarray, num_features: int, device: torch.device | str = "cpu") -> Placement:
        """rows: integers [N]. ValueError: a row outside 0 .. num_features - 1."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1 or (len(rows) and not 0 <= rows.min() <= rows.max() < num_features):
            raise ValueError(f"rows {list(rows.shape)}: must be [N], each within 0 .. {num_features - 1}")
        order = np.argsort(rows, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_features))])
        tensors = [torch.from_numpy(each.astype(np.int64)).to(device) for each in (rows, order, starts)]
        return Placement(tensors[0], tensors[1], tensors[2], num_features)
