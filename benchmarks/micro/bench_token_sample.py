"""An id of each row of Qwen2.5-VL's vocabulary; the reference is torch's sums, search and, with a truncation, sort."""

import pytest
import torch
from vtengine_kernels.token_sample import Truncation, token_sample


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("kind", ["greedy", "a draw", "top-p of top-k"])
def test_token_sample(measure, impl, device, kind, rows):
    scores = 2.5 * torch.randn(rows, 152_064, device=device)
    scores[:, 1000] += 14  # a likely id, as most tokens of a reply have one
    draws = torch.rand(rows, dtype=torch.float64, device=device), torch.ones(rows, device=device)
    limits = (torch.full((rows,), limit, device=device) for limit in (50, 0.9, 0.0))
    given = {"greedy": (), "a draw": draws, "top-p of top-k": (*draws, Truncation(*limits))}[kind]
    name = "torch" if impl == "ref" else impl
    with torch.inference_mode():
        measure("token_sample", f"{kind}, {rows} rows", lambda: token_sample(scores, *given, impl=name))
