"""Products of decoding on a CPU: few rows with the matrix of a gate of the 3B model, in bfloat16, beside torch."""

import pytest
import torch
from torch.nn import functional as F
from vtengine_kernels import few_rows


@pytest.mark.parametrize("rows", [1, 8, 24])
def test_few_rows(measure, impl, device, rows):
    if device == "cuda" or (reason := few_rows.missing()):
        pytest.skip("the product runs the reference here" if device == "cuda" else reason)
    x, weight = (torch.randn(shape, 2048, dtype=torch.bfloat16) for shape in (rows, 22_016))
    product = F.linear if impl == "ref" else few_rows.product
    with torch.inference_mode():
        measure("few_rows", f"{rows} row{'s' * (rows > 1)}", lambda: product(x, weight))
