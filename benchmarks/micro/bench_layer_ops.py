"""Norm, gate and rotary embedding of the 7B model, in inference; the reference is torch."""

import pytest
import torch
from vtengine_kernels import layer_ops


@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "rotary"])
def test_layer_ops(measure, impl, device, dtype, op, rows):
    x = torch.randn(rows, 3584, device=device, dtype=dtype)
    angles = torch.randn(rows, 1, 128, device=device)
    arguments = {
        "rms_norm": (x, torch.ones(3584, device=device, dtype=dtype), 1e-6),
        "swiglu": (torch.randn(rows, 2 * 18_944, device=device, dtype=dtype),),
        "rotary": (x.view(rows, 28, 128), angles.cos(), angles.sin()),
    }[op]
    name = "torch" if impl == "ref" else impl
    with torch.inference_mode():
        measure(op, f"{rows} row{'s' * (rows > 1)}", lambda: getattr(layer_ops, op)(*arguments, impl=name))
