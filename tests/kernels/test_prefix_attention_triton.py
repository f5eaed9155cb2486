"""The Triton kernel without a GPU: interpreted in a process of its own, and compiled for sm_90."""

from __future__ import annotations

import pytest
import torch
from vtengine_kernels.prefix_attention import triton as kernel

from tests.kernels.ahead_of_time import compiled
from tests.kernels.interpreting import run_interpreted

pytestmark = pytest.mark.skipif(kernel.missing() is not None, reason=str(kernel.missing()))

INTERPRETED = """
import json, torch
from vtengine_kernels.prefix_attention import prefix_attention, ref
from vtengine_kernels.prefix_attention.cases import CASES
errors = {}
for name, case in CASES.items():
    for dtype in (torch.float32, torch.float16):  # the interpreter multiplies bfloat16 wrongly
        q, keys, values, tables, lengths = case.tensors(dtype)
        out = prefix_attention(q, keys, values, tables, lengths, impl="triton")
        assert out.shape == q.shape and out.dtype == dtype
        plain = ref.prefix_attention(q, keys, values, tables, lengths, q.shape[2] ** -0.5)
        exact = ref.prefix_attention(q.double(), keys.double(), values.double(), tables, lengths, q.shape[2] ** -0.5)
        ours, torchs = ((x - exact).abs().max().item() if x.numel() else 0.0 for x in (out, plain))
        errors[f"{name} {dtype}"] = (ours, torchs)
print(json.dumps(errors))
"""


def test_interpreted_it_errs_no_more_than_torch():
    for name, (ours, torchs) in run_interpreted(INTERPRETED, timeout_s=120).items():
        assert ours <= torchs + (1e-2 if "float16" in name else 5e-6), name


@pytest.mark.skipif(kernel.interpreted(), reason="TRITON_INTERPRET is set")
@pytest.mark.parametrize(
    ("dtype", "group", "size"), [("bf16", 7, 128), ("fp16", 4, 64), ("fp32", 2, 64), ("bf16", 8, 80), ("bf16", 8, 256)]
)
def test_it_compiles_for_sm_90_without_spills(tmp_path, dtype, group, size):
    constants = {"GROUP": group, "SIZE": size, "PAGE": 16, **kernel.blocks(group, size)}
    types = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr", "out_ptr"), f"*{dtype}")
    types |= {"tables_ptr": "*i64", "lengths_ptr": "*i64", "scale": "fp32"}
    needs = compiled(kernel._prefix_attention_fwd_kernel, types, constants, 90, tmp_path)
    assert needs.spill_bytes == 0
    assert needs.shared_bytes <= 64 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu_it_errs_no_more_than_torch(dtype):
    from vtengine_kernels.prefix_attention import prefix_attention, ref
    from vtengine_kernels.prefix_attention.cases import CASES

    for case in CASES.values():
        q, keys, values, tables, lengths = (x.cuda() for x in case.tensors(dtype))
        out = prefix_attention(q, keys, values, tables, lengths, impl="triton")
        if len(q):
            scale = q.shape[2] ** -0.5
            exact = ref.prefix_attention(q.double(), keys.double(), values.double(), tables, lengths, scale)
            plain = ref.prefix_attention(q, keys, values, tables, lengths, scale)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            assert (out - exact).abs().max() <= (plain - exact).abs().max() + tolerance
