"""Attention over pages: one query token per row, and many."""

import pytest
import torch
from vtengine_kernels.paged_prefill import paged_prefill
from vtengine_kernels.prefix_attention import prefix_attention
from vtengine_kernels.prefix_attention.cases import CASES, Case

PICKED = {"usual": CASES["usual"], "8 rows of 1,000, 7B": Case((1000,) * 8, heads=28, kv_heads=4, size=128)}


@pytest.mark.parametrize("case", PICKED)
def test_prefix_attention(measure, impl, device, dtype, case):
    tensors = [x.to(device) for x in PICKED[case].tensors(dtype)]
    with torch.inference_mode():
        measure("prefix_attention", case, lambda: prefix_attention(*tensors, impl=impl))


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
