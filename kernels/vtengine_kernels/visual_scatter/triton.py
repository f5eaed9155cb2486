"""The Triton implementation: one program per feature and block of columns adds up its rows, one after another."""

from __future__ import annotations

from torch import Tensor

from vtengine_kernels.triton_runtime import interpreted, launch, missing
from vtengine_kernels.visual_scatter.placement import Placement

BLOCK = 1024

if missing() is None:
    import triton
    import triton.language as tl

    # Suffix: H columns of a block.
    @triton.jit
    def _segment_sum_kernel(grad_ptr, order_ptr, starts_ptr, out_ptr, columns, BLOCK_H: tl.constexpr):
        feature = tl.program_id(0).to(tl.int64)
        h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        real_H = h_H < columns
        begin, end = tl.load(starts_ptr + feature), tl.load(starts_ptr + feature + 1)
        sum_H = tl.zeros((BLOCK_H,), dtype=tl.float32)
        for n in range(begin, end):
            place = tl.load(order_ptr + n)
            sum_H += tl.load(grad_ptr + place * columns + h_H, mask=real_H, other=0.0).to(tl.float32)
        tl.store(out_ptr + feature * columns + h_H, sum_H.to(out_ptr.dtype.element_ty), mask=real_H)


def takes(features: Tensor) -> bool:
    return missing() is None and (features.is_cuda or interpreted())


def segment_sum(grad: Tensor, placement: Placement) -> Tensor:
    """Contract: ref.segment_sum. grad contiguous."""
    columns = grad.shape[1]
    out = grad.new_empty((placement.num_features, columns))
    if out.numel():
        grid = (placement.num_features, -(-columns // BLOCK))
        launch(_segment_sum_kernel, grid, grad, placement.order, placement.starts, out, columns, BLOCK_H=BLOCK)
    return out
