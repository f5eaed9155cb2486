"""Decoding, resizing and patchifying inside SGLang by our code, for images that arrive as encoded bytes.

The pixels are then those that `vtengine` computes itself, to the bit: Pillow's decoder (on a GPU SGLang decodes JPEGs
with nvJPEG) and our fused kernel. Sizes come from the checkpoint's own processor settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from vtengine_kernels.patchify import Target, patchify

from vtengine.vision.plan import PixelLimits, plan_high

LOAD_IMAGE = "sglang.srt.utils.common.load_image"
PREPROCESS = "transformers.models.qwen2_vl.image_processing_qwen2_vl.Qwen2VLImageProcessor.preprocess"


def load_with_pillow(load: Callable[..., Any], image: Any, *_: Any, **__: Any) -> Any:
    """Around SGLang's load_image: never with the GPU's JPEG decoder."""
    return load(image, False)


def preprocess(theirs: Callable[..., Any], processor: Any, images: Any, **options: Any) -> Any:
    """Around Qwen2VLImageProcessor.preprocess: pixel_values float32 [P, 1176] and image_grid_thw int64 [n, 3].

    What is no plain list of pictures, and a processor with other settings than Qwen2.5-VL's, goes the old way.
    """
    pictures = images if isinstance(images, list) else [images]
    if not all(isinstance(picture, Image.Image) for picture in pictures) or not _is_ours(processor, options):
        return theirs(processor, images, **options)
    from transformers import BatchFeature

    size = options.get("size") or processor.size
    limits = PixelLimits(int(size["shortest_edge"]), int(size["longest_edge"]))
    rows, grids = [], []
    for picture in pictures:
        plan = plan_high(picture.width, picture.height, limits)
        pixels_HWC = np.asarray(picture.convert("RGB"))
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        rows += patchify(pixels_HWC, [Target(plan.height, plan.width)], layout="full", mean=mean, std=std)
        grids.append(plan.grid_thw)
    data = {"pixel_values": torch.cat(rows), "image_grid_thw": torch.tensor(grids, dtype=torch.int64)}
    return BatchFeature(data=data)


def _is_ours(processor: Any, options: dict[str, Any]) -> bool:
    """Whether these are the settings that our kernel implements."""
    sizes = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
    steps = (processor.do_resize, processor.do_rescale, processor.do_normalize)
    changed = set(options) - {"return_tensors", "device", "size", "disable_grouping"}
    return sizes == (14, 2, 2) and all(steps) and int(processor.resample) == Image.Resampling.BICUBIC and not changed
