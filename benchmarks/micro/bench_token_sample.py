"""An id of each row of Qwen2.5-VL's vocabulary; the reference is torch's sums and search, which the CPU has too."""

import pytest
import torch
from vtengine_kernels.token_sample import token_sample


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("kind", ["greedy", "a draw"])
def test_token_sample(measure, impl, cuda, kind, rows):
    scores = 4 * torch.randn(rows, 152_064, device=cuda)
    draws = torch.rand(rows, dtype=torch.float64, device=cuda), torch.ones(rows, device=cuda)
    given = (None, None) if kind == "greedy" else draws
    name = "torch" if impl == "ref" else impl
    with torch.inference_mode():
        measure("token_sample", f"{kind}, {rows} rows", lambda: token_sample(scores, *given, impl=name))
