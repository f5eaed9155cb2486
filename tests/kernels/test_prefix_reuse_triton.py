"""The Triton kernels of shared_prefix_attention and visual_scatter without a GPU: interpreted, and compiled."""

from __future__ import annotations

import importlib

import pytest
from vtengine_kernels.shared_prefix_attention import merge
from vtengine_kernels.visual_scatter import triton as scatter

from tests.kernels.ahead_of_time import ARCHITECTURES, compiled
from tests.kernels.interpreting import run_interpreted

pytestmark = [
    pytest.mark.skipif(scatter.missing() is not None, reason=str(scatter.missing())),
    pytest.mark.skipif(scatter.interpreted(), reason="TRITON_INTERPRET is set"),
]

MERGED = """
import json, torch
from vtengine_kernels.shared_prefix_attention.merge import has_triton, merge_
errors = {}
for tokens, heads, size in ((13, 7, 32), (1, 1, 16), (5, 28, 128), (11, 3, 80), (6, 2, 64)):
    for dtype in (torch.float32, torch.float16):
        generator = torch.Generator().manual_seed(tokens)
        rows = torch.randperm(tokens, generator=generator)[: (tokens + 1) // 2]
        for where in (rows, slice(tokens // 2, tokens), slice(0, 0)):
            count = len(torch.arange(tokens)[where])
            # Memory around the tensors is poisoned: a read or write beyond them shows.
            whole = torch.full((tokens + 2, heads, size), float("nan"), dtype=dtype)
            out = whole[1:-1].normal_(generator=generator)
            lse = 30 * torch.randn(heads, tokens, generator=generator)
            part = torch.randn(count, heads, size, generator=generator).to(dtype)
            part_lse = 30 * torch.randn(heads, count, generator=generator)
            both = torch.stack([lse[:, where], part_lse]).double()
            weights = both.softmax(0).transpose(1, 2)[..., None]
            exact = out.double().clone()
            exact[where] = out[where].double() * weights[0] + part.double() * weights[1]
            exact_lse = lse.double().clone()
            exact_lse[:, where] = both.logsumexp(0)
            assert has_triton(out)
            merge_(out, lse, part, part_lse, where)
            assert whole[0].isnan().all() and whole[-1].isnan().all() and not whole[1:-1].isnan().any()
            errors[f"{tokens} {heads} {size} {dtype} {count}"] = (
                float((out - exact).abs().max()), float((lse - exact_lse).abs().max() / 30)
            )
print(json.dumps(errors))
"""

SUMMED = """
import json, torch, numpy as np
from vtengine_kernels.visual_scatter import Placement, visual_scatter
errors = {}
for places, features, width in ((101, 13, 37), (1, 1, 1), (0, 5, 8), (7, 31, 64), (9, 2, 1030)):
    for dtype in (torch.float32, torch.float16):
        rows = np.random.default_rng(0).integers(0, features, places)
        x = torch.randn(features, width).to(dtype).requires_grad_()
        whole = torch.full((places + 2, width), float("nan"), dtype=dtype)
        grad = whole[1:-1].normal_()
        out = visual_scatter(x, Placement.of(rows, features), impl="triton")
        assert torch.equal(out, x[torch.from_numpy(rows)])
        (found,) = torch.autograd.grad(out, x, grad)
        exact = torch.zeros(features, width, dtype=torch.float64).index_add_(0, torch.from_numpy(rows), grad.double())
        errors[f"{places} {features} {width} {dtype}"] = float((found - exact).abs().max())
print(json.dumps(errors))
"""


def test_interpreted_merge():
    for name, (error, lse_error) in run_interpreted(MERGED).items():
        assert error <= (4e-3 if "float16" in name else 1e-6), name
        assert lse_error <= 1e-6, name


def test_interpreted_segment_sum():
    for name, error in run_interpreted(SUMMED).items():
        assert error <= (1e-2 if "float16" in name else 1e-5), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "heads", "size"), [("bf16", 28, 128), ("fp16", 16, 64), ("bf16", 7, 256)])
def test_merge_compiles_without_spills(tmp_path, record_property, arch, dtype, heads, size):
    types = dict.fromkeys(("out_ptr", "part_ptr"), f"*{dtype}") | dict.fromkeys(("lse_ptr", "part_lse_ptr"), "*fp32")
    types |= {"rows_ptr": "*i64"}
    constants = {"HEADS": heads, "SIZE": size, "INDEXED": True, **merge.blocks(heads, size)}
    needs = compiled(merge._merge_kernel, types, constants, arch, tmp_path)
    record_property("needs", str(needs))
    assert needs.spill_bytes == 0 and needs.registers <= 128
    ptx = (tmp_path / "kernel.ptx").read_text()
    between = ptx[ptx.rindex("ld.global") : ptx.rindex("st.global")]
    assert "bar.sync" in between  # all threads have read the log-sum-exps that are written over


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_segment_sum_compiles_without_spills(tmp_path, record_property, arch, dtype):
    types = {"grad_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "order_ptr": "*i64", "starts_ptr": "*i64"}
    needs = compiled(scatter._segment_sum_kernel, types, {"BLOCK_H": scatter.BLOCK}, arch, tmp_path)
    record_property("needs", str(needs))
    assert needs.spill_bytes == 0 and needs.registers <= 64


@pytest.mark.gpu
def test_merge_on_the_gpu():
    torch = importlib.import_module("torch")
    for dtype in (torch.float32, torch.bfloat16):
        out, part = (torch.randn(1000, 28, 128, device="cuda").to(dtype) for _ in range(2))
        lse, part_lse = (torch.randn(28, 1000, device="cuda") * 9 for _ in range(2))
        rows = torch.randperm(1000, device="cuda")
        weights = torch.stack([lse[:, rows], part_lse]).double().softmax(0).transpose(1, 2)[..., None]
        exact = out[rows].double() * weights[0] + part.double() * weights[1]
        merge.merge_(out, lse, part, part_lse, rows)
        torch.testing.assert_close(out[rows].double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
