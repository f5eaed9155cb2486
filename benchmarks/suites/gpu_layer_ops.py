"""Norm, gate and rotary embedding on a GPU: one launch each against torch's, at the sizes of Qwen2.5-VL-7B (bfloat16).

Replays of a CUDA graph (see `on_gpu`). `floor_us`: every number in and out once, at the rate of a copy measured in the
same run; few rows lie in the second-level cache, as they do between a model's products. `down`: the product of the
vision tower whose rows of 3420 numbers end between two pieces of 16 bytes, with zeros behind them and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from on_gpu import captured
from suites.gpu_patchify import copy_rate
from vtengine_kernels import layer_ops
from vtengine_kernels.layer_ops import flashinfer

from vtengine.model.layers import SwiGLU, rotary_tables, store_aligned

TESTS = ["-m", "gpu", "tests/kernels/test_layer_ops_triton.py"]
HIDDEN, INNER, HEADS, SIZE = 3584, 18944, 32, 128
ROWS = (1, 64, 8192)
REPEATS = 50
TABLES = {
    "gpu-layer-ops": {
        "columns": {
            "op": "Op",
            "rows": "Rows",
            "triton_us": "Ours, µs",
            "torch_us": "torch, µs",
            "flashinfer_us": "FlashInfer, µs",
            "floor_us": "Floor, µs",
            "speedup": "Against torch",
        }
    }
}


def run(context: Any) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    rate = copy_rate(context)
    for rows in ROWS[:2] if context.quick else ROWS:
        for name, (op, tensors, numbers) in ops(rows).items():
            yield measured(context, name, rows, op, tensors, numbers, rate)
    yield down(context)


def ops(rows: int) -> dict[str, tuple[Callable[..., object], tuple[Any, ...], int]]:
    """By name: the op, its arguments, how many 16-bit numbers it reads and writes."""
    x, y, wide = (torch.randn(rows, size, device="cuda", dtype=torch.bfloat16) for size in (HIDDEN, HIDDEN, 2 * INNER))
    weight, heads = torch.rand_like(x[0]), torch.randn(rows, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
    tables = rotary_tables(torch.rand(rows, SIZE // 2, device="cuda"))
    return {
        "rms_norm": (layer_ops.rms_norm, (x, weight, 1e-6), 2 * x.numel()),
        "add_rms_norm": (layer_ops.add_rms_norm, (x, y, weight, 1e-6), 4 * x.numel()),
        "swiglu": (layer_ops.swiglu, (wide,), wide.numel() + wide.numel() // 2),
        "rotary": (layer_ops.rotary, (heads, *tables), 2 * heads.numel() + 4 * rows * SIZE),
    }


def measured(
    context: Any, name: str, rows: int, op: Callable[..., object], tensors: tuple[Any, ...], numbers: int, rate: float
) -> dict[str, Any]:
    impls = ["triton", "torch"]
    if name == "swiglu" and flashinfer.missing() is None:
        impls.append("flashinfer")
    with torch.inference_mode():
        calls = {impl: captured(partial(op, *tensors, impl=impl), REPEATS) for impl in impls}
        found = context.compare(calls, rounds=7, min_round_s=0.005, warmup=2, after=torch.cuda.synchronize)
    us = {f"{impl}_us": 1e6 * one.median_s / REPEATS for impl, one in found.items()}
    row = {"op": name, "rows": rows, "flashinfer_us": None, **us, "floor_us": 2e6 * numbers / rate}
    return row | {"speedup": us["torch_us"] / us["triton_us"]}


def down(context: Any) -> dict[str, Any]:
    """Both sides with the gate, whose result has the zeros too."""
    rows, size, inner = 1024 if context.quick else 16_384, 1280, 3420
    mlp = SwiGLU(size, inner, bias=True).to("cuda", torch.bfloat16).requires_grad_(False)
    store_aligned(mlp)
    x = torch.randn(rows, 2 * inner, device="cuda", dtype=torch.bfloat16)
    mlp.gate_up = torch.nn.Identity()
    alone = torch.nn.Linear(inner, size, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        sides = {"triton": partial(mlp, x), "torch": lambda: alone(layer_ops.swiglu(x))}
        calls = {name: captured(side, 10) for name, side in sides.items()}
        found = context.compare(calls, rounds=7, min_round_s=0.005, warmup=2, after=torch.cuda.synchronize)
    us = {f"{name}_us": 1e5 * one.median_s for name, one in found.items()}
    row = {"op": "swiglu and down, 3420", "rows": rows, "flashinfer_us": None, **us, "floor_us": None}
    return row | {"speedup": us["torch_us"] / us["triton_us"]}
