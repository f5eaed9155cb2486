"""The reference: index_add in float32, which on a CPU runs in order; elsewhere a sum over sorted segments."""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.visual_scatter.placement import Placement


def missing() -> str | None:
    return None


def takes(features: Tensor) -> bool:
    return True


def segment_sum(grad: Tensor, placement: Placement) -> Tensor:
    """grad [N, H] -> [num_features, H]: the sum of the rows at each feature's places."""
    wide = grad if grad.dtype == torch.float64 else grad.float()
    if grad.device.type == "cpu":
        total = wide.new_zeros(placement.num_features, grad.shape[1]).index_add_(0, placement.rows, wide)
    else:
        in_order = wide.index_select(0, placement.order)
        total = torch.segment_reduce(in_order, "sum", offsets=placement.starts, initial=0, unsafe=True)
    return total.to(grad.dtype)
