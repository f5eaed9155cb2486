"""Images to rows of pixel values, in one view of about their size."""

import numpy as np
import pytest
import torch
from vtengine_kernels.patchify import Target, patchify

SIZES = ((384, 512), (768, 1024))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_patchify(measure, impl, device, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    view = [Target(round(height / 28) * 28, round(width / 28) * 28)]
    if device == "cuda" and impl == "auto":
        image = torch.from_numpy(image).cuda()
    measure("patchify", f"{width}x{height}", lambda: patchify(image, view, layout="compact", impl=impl))
