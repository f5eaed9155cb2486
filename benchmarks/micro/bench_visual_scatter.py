"""Features of one image to eight sequences, and their gradients back; the reference is torch's indexing."""

import numpy as np
import torch
from vtengine_kernels.visual_scatter import Placement, visual_scatter


def test_visual_scatter(measure, impl, device, dtype):
    placement = Placement.of(np.tile(np.arange(256), 8), 256, device)
    features = torch.randn(256, 2048, device=device, dtype=dtype, requires_grad=True)

    def call():
        out = features[placement.rows] if impl == "ref" else visual_scatter(features, placement)
        torch.autograd.grad(out.sum(), features)

    measure("visual_scatter", "256 features in 8 places", call)
