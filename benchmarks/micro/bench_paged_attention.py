"""Attention over pages: one query token per row, and many."""

import pytest
import torch
from vtengine_kernels.paged_prefill import paged_prefill
from vtengine_kernels.prefix_attention import prefix_attention
from vtengine_kernels.prefix_attention.cases import CASES, Case

PICKED = {"usual": CASES["usual"], "8 rows of 1,000, 7B": Case((1000,) * 8, heads=28, kv_heads=4, size=128)}


@pytest.mark.parametrize("case", PICKED)
@pytest.mark.parametrize("is_large", [False, True])
def test_prefix_attention(measure, impl, device, dtype, case, is_large):
    """is_large: as for a large model, which is in bfloat16 on a CPU too."""
    if is_large and device == "cuda":
        pytest.skip("bfloat16 already")
    tensors = [x.to(device) for x in PICKED[case].tensors(torch.bfloat16 if is_large else dtype)]
    with torch.inference_mode():
        measure("prefix_attention", case + ", bfloat16" * is_large, lambda: prefix_attention(*tensors, impl=impl))


@pytest.mark.parametrize("case", PICKED)
def test_paged_prefill(measure, impl, cuda, dtype, case):
    """The last tokens of each row, at most 32, are queries."""
    picked = PICKED[case]
    _, *cache, tables, lengths = (x.to(cuda) for x in picked.tensors(dtype))
    counts = torch.tensor([min(length, 32) for length in picked.lengths])
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(cuda)
    q = torch.randn(int(counts.sum()), picked.heads, picked.size).to(cuda, dtype)
    with torch.inference_mode():
        arguments = (q, *cache, tables, lengths, offsets, int(counts.max()))
        measure("paged_prefill", case, lambda: paged_prefill(*arguments, impl=impl))
