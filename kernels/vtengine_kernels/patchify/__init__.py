"""patchify: image to pixel values, the input rows of the Qwen2-VL family's vision tower.

uint8 [H, W, 3] -> antialiased resize -> rescale by 1/255 -> normalise -> 14x14 patches in merge-window order.

Rows: the 2x2 patches of a 28x28 window follow one another (top left, top right, bottom left, bottom right), windows row
by row. Columns: channel, then (layout "full") two equal frames, then 14x14 pixels: 1176 columns; layout "compact" has
each pixel once, 588 columns, for a patch embedding whose weight was summed over the two frames.

Exact: every 8-bit level of the resized image is Pillow's (22-bit fixed point, each pass rounded; `order` says whose
order of the passes: "pil13" Pillow >= 13, "pil12" before), every float32 is that of the transformers PIL backend,
bfloat16 is that float32 rounded to nearest even. Sources: Pillow Resample.c, transformers
image_processing_pil_qwen2_vl.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from vtengine_kernels import dispatch
from vtengine_kernels.patchify import native, ref
from vtengine_kernels.patchify.contract import Layout, Target, checked_plan
from vtengine_kernels.patchify.fixed_point import Box, Filter, Order
from vtengine_kernels.patchify.normalise import CLIP_MEAN, CLIP_STD

__all__ = ["CLIP_MEAN", "CLIP_STD", "Box", "Filter", "Layout", "Order", "Target", "patchify"]


def patchify(
    image_HWC: np.ndarray | torch.Tensor,
    targets: Sequence[Target],
    *,
    filter: Filter = "bicubic",
    layout: Layout = "full",
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    impl: Literal["auto", "cpu", "ref"] = "auto",
    num_threads: int = 1,
    order: Order = "pil13",
    out: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Pixel values of each target, in order: dtype [height/14 * width/14, 1176 | 588] on the CPU.

    image_HWC: uint8 [H, W, 3], C-contiguous, on the CPU, RGB; may be read-only. All targets are made from one read of
    it. dtype: float32 or bfloat16. out: tensors to write into, one per target; without it, large outputs come from
    vtengine_kernels.buffers, which uses the memory of those that are gone again. The GIL is released meanwhile.

    ValueError: an argument outside its range, with the remedy; nothing was written then. RuntimeError: `impl` is not
    available here.
    """
    chosen = dispatch.choose("patchify", impl)
    plan = checked_plan(
        image_HWC,
        targets,
        filter=filter,
        layout=layout,
        dtype=dtype,
        mean=mean,
        std=std,
        num_threads=num_threads,
        order=order,
        out=out,
    )
    return native.run(plan) if chosen == "cpu" else ref.run(plan)
