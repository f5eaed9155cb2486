"""The Triton gate and rotary embedding: interpreted beside torch and float64, and compiled."""

from __future__ import annotations

import math
from importlib.metadata import version

import pytest
import torch
from vtengine_kernels import layer_ops
from vtengine_kernels.layer_ops import plain, triton

from benchmarks.suites import triton_resources
from tests.kernels.interpreting import run_interpreted

SPECS = [spec for spec in triton_resources.SPECS if spec.op == "layer_ops"]
needs_triton = pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))
not_interpreted = pytest.mark.skipif(triton.interpreted(), reason="TRITON_INTERPRET is set")


def wide(*shape, dtype=torch.float32, device="cpu", seed=0):
    """A view of these numbers in rows that are longer, by NaN that must not be read."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype) * 4
    whole = torch.full((shape[0], math.prod(shape[1:]) + 5), torch.nan, dtype=dtype, device=device)
    whole[:, :-5] = x.flatten(1)
    return whole[:, :-5].unflatten(1, shape[1:])


def no_worse(out, theirs, exact):
    assert out.dtype == theirs.dtype and out.shape == theirs.shape and out.is_contiguous()
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    own, torchs = (float((x.double() - exact).abs().max()) if x.numel() else 0.0 for x in (out, theirs))
    assert own <= torchs + 3e-7 * largest, (own, torchs)


def interpreter_fuses():
    """Before Triton 3.9, fma rounds twice when interpreted."""
    return tuple(int(part) for part in version("triton").split(".")[:2]) >= (3, 9)


def turned(x, cos, signed_sin):
    """The rotary embedding with one fused multiply-add, to the bit: float64 holds its product exactly."""
    return ((x * cos).double() + x.roll(x.shape[-1] // 2, -1).double() * signed_sin.double()).float()


@torch.inference_mode()
def check(dtypes, device="cpu"):
    for dtype in dtypes:
        for rows, heads, size in ((0, 2, 8), (1, 1, 2), (3, 5, 6), (2, 32, 128), (2, 33, 80)):
            x = wide(rows, heads, size, dtype=dtype, device=device)
            angles = wide(rows, 1, size // 2, device=device, seed=1)
            tables = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
            out, theirs = (layer_ops.rotary(x, *tables, impl=impl) for impl in ("triton", "torch"))
            no_worse(out, theirs, plain.rotary(x.double(), *(table.double() for table in tables)))
            if dtype == torch.float32 and device == "cpu" and interpreter_fuses():
                assert torch.equal(out, turned(x, *tables))
        for rows, size in ((0, 3), (1, 1), (3, 13), (2, 1025), (2, 3420)):
            x = wide(rows, 2 * size, dtype=dtype, device=device)
            x[:, :1] = torch.tensor(-1000.0)
            exact = plain.swiglu(x.double())
            for columns in (None, size, size + 4):
                out, theirs = (layer_ops.swiglu(x, columns=columns, impl=impl) for impl in ("triton", "torch"))
                no_worse(out[:, :size].contiguous(), theirs[:, :size].contiguous(), exact)
                assert out.shape == theirs.shape and (out[:, size:] == 0).all()
        for rows, size in ((0, 4), (1, 1), (5, 80), (40, 128), (3, 1280), (2, 3584)):
            x, y = (wide(rows, size, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
            weight = wide(1, size, dtype=dtype, device=device, seed=2)[0]
            exact = plain.rms_norm(x.double(), weight.double(), 1e-6)
            no_worse(*(layer_ops.rms_norm(x, weight, 1e-6, impl=impl) for impl in ("triton", "torch")), exact)
            (total, out), (torchs, theirs) = (
                layer_ops.add_rms_norm(x, y, weight, 1e-6, impl=impl) for impl in ("triton", "torch")
            )
            assert torch.equal(total, torchs) and total.is_contiguous()
            no_worse(out, theirs, plain.rms_norm(total.double(), weight.double(), 1e-6))
            alone = layer_ops.add_rms_norm(x[-1:], y[-1:], weight, 1e-6, impl="triton")[1]
            assert torch.equal(alone, out[-1:])
    infinite = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0, 1.0, 1.0]], device=device)
    torch.testing.assert_close(layer_ops.swiglu(infinite, impl="triton"), plain.swiglu(infinite), equal_nan=True)


@needs_triton
@not_interpreted
def test_interpreted():
    code = (
        "import json, torch; from tests.kernels.test_layer_ops_triton import check; "
        "check((torch.float32, torch.float16)); print(json.dumps(1))"
    )
    assert run_interpreted(code) == 1


@needs_triton
@not_interpreted
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
@pytest.mark.parametrize("arch", triton_resources.ARCHITECTURES)
def test_compiles_without_spills(tmp_path, arch, spec):
    needs = triton_resources.needs(spec, arch, tmp_path)
    assert needs.spill_bytes == 0 and needs.registers <= 128


def test_it_is_for_inference_on_cuda():
    x = torch.randn(2, 8)
    with torch.inference_mode():
        assert not triton.takes(x) or triton.interpreted()
        if not triton.interpreted():
            with pytest.raises((ValueError, RuntimeError), match="triton"):
                layer_ops.rms_norm(x, torch.ones(8), 1e-6, impl="triton")
    assert not triton.takes(x)  # gradients may be wanted


@pytest.mark.gpu
def test_on_the_gpu():
    check((torch.float32, torch.float16, torch.bfloat16), "cuda")
