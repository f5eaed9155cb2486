"""Attention over packs that share their beginnings, forward and backward."""

import pytest
import torch
from vtengine_kernels.shared_prefix_attention import shared_prefix_attention
from vtengine_kernels.shared_prefix_attention.cases import CASES, Case

PICKED = {"7b": CASES["7b"], "8 replies to 500 tokens": Case((500, *(60,) * 8), (-1, *(0,) * 8), heads=14)}


@pytest.mark.parametrize("case", PICKED)
def test_shared_prefix_attention(measure, impl, device, dtype, case):
    tree = PICKED[case].tree
    qkv = [x.to(device).requires_grad_() for x in PICKED[case].tensors(dtype)]
    measure(
        "shared_prefix_attention",
        case,
        lambda: torch.autograd.grad(shared_prefix_attention(*qkv, tree, impl=impl).sum(), qkv),
    )
