"""patchify: image to pixel values, the input rows of the vision towers of Qwen2-VL and its successors.

uint8 [H, W, 3] -> antialiased resize(s) -> rescale by 1/255 -> normalise -> PxP patches in merge-window order. P is 14
pixels, or 16 for Qwen3-VL.

Rows: the 2x2 patches of a window follow one another (top left, top right, bottom left, bottom right), windows row by
row. Columns: channel, then (layout "full") two equal frames, then PxP pixels: 1176 columns, or 1536; layout "compact"
has each pixel once, 588 or 768 columns, for a patch embedding whose weight was summed over the two frames.

Exact. `mode` says whose arithmetic is repeated: every 8-bit level of the resized image is that of Pillow ("pil13": 13
or newer; "pil12": before, with another order of the passes) or of torchvision on 8-bit tensors ("tv"), every float32 is
that of the transformers processor of that backend, bfloat16 is that float32 rounded to nearest even. Sources: Pillow
Resample.c, PyTorch UpSampleKernel.cpp, transformers image_processing_pil_qwen2_vl and image_processing_qwen2_vl.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from vtengine_kernels import triton_runtime
from vtengine_kernels.patchify import native, ref, triton
from vtengine_kernels.patchify.contract import Layout, Step, Target, checked_plan
from vtengine_kernels.patchify.fixed_point import Box, Filter, Mode
from vtengine_kernels.patchify.normalise import CLIP_MEAN, CLIP_STD, HALF

__all__ = ["CLIP_MEAN", "CLIP_STD", "HALF", "Box", "Filter", "Layout", "Mode", "Step", "Target", "patchify"]


def patchify(
    image_HWC: np.ndarray | torch.Tensor,
    targets: Sequence[Target],
    *,
    filter: Filter = "bicubic",
    layout: Layout = "full",
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    impl: Literal["auto", "triton", "cpu", "ref"] = "auto",
    num_threads: int = 1,
    mode: Mode = "pil13",
    patch: int = 14,
    device: torch.device | str | None = None,
    out: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Pixel values of each target, in order: dtype [height/P * width/P, 6 P^2 | 3 P^2] on `device`; P is `patch`.

    image_HWC: uint8 [H, W, 3], C-contiguous, RGB; may be read-only. All targets are made from one read, or one upload,
    of it. dtype: float32 or bfloat16. device: None = where the image is; from the CPU it may be brought to a GPU, where
    impl "triton" does the work, on the current stream. out: tensors to write into, one per target; without it, large
    outputs on the CPU come from vtengine_kernels.buffers, which uses the memory of those that are gone again. On the
    CPU the GIL is released meanwhile. num_threads: of impl "cpu".

    ValueError: an argument outside its range, with the remedy; nothing was written then. RuntimeError: `impl` is not
    available here.
    """
    plan = checked_plan(
        image_HWC,
        targets,
        filter=filter,
        layout=layout,
        dtype=dtype,
        mean=mean,
        std=std,
        num_threads=num_threads,
        mode=mode,
        patch=patch,
        device=device,
        out=out,
    )
    return _chosen(impl, plan.device.type == "cuda").run(plan)


_MODULES: dict[str, Any] = {"cpu": native, "ref": ref, "triton": triton}


def _chosen(impl: str, on_gpu: bool) -> Any:
    """The module that is to work. ValueError: none of that name, or not where the outputs are to be. RuntimeError: it
    is not available here."""
    if impl == "auto":
        impl = "triton" if on_gpu else "cpu" if native.missing() is None else "ref"
    if impl not in _MODULES:
        raise ValueError(f"patchify: impl = {impl!r}: must be one of auto, {', '.join(_MODULES)}")
    reason = _MODULES[impl].missing()
    if reason is not None:
        raise RuntimeError(f"patchify: impl = {impl!r} is not available: {reason}")
    if on_gpu != (impl == "triton") and not (impl == "triton" and triton_runtime.interpreted()):
        raise ValueError(f"impl = {impl!r}: does not work on {'cuda' if on_gpu else 'cpu'}; leave it out")
    return _MODULES[impl]
