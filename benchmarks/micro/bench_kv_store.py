"""Keys and values of a pass into their pages, 4 heads of 128; the reference is torch's indexed copies."""

import pytest
import torch
from vtengine_kernels.kv_store import kv_store


@pytest.mark.parametrize("tokens", [16, 512])
def test_kv_store(measure, impl, cuda, dtype, tokens):
    k, v = torch.randn(2, tokens, 4, 128, device=cuda, dtype=dtype)
    keys, values = torch.zeros(2, 64, 16, 4, 128, device=cuda, dtype=dtype)
    slots = torch.randperm(64 * 16, generator=torch.Generator().manual_seed(0))[:tokens].to(cuda)
    name = "torch" if impl == "ref" else impl
    with torch.inference_mode():
        measure("kv_store", f"{tokens} tokens", lambda: kv_store(k, v, keys, values, slots, impl=name))
