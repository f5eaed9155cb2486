"""The Triton kernel without a GPU: interpreted in a process of its own, and compiled for sm_90."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vtengine_kernels.prefix_attention import triton as kernel

pytestmark = pytest.mark.skipif(kernel.missing() is not None, reason=str(kernel.missing()))
ROOT = Path(__file__).resolve().parents[2]

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


def run_interpreted(code):
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_interpreted_it_errs_no_more_than_torch():
    done = run_interpreted(INTERPRETED)
    assert done.returncode == 0, done.stderr
    for name, (ours, torchs) in json.loads(done.stdout).items():
        assert ours <= torchs + (1e-2 if "float16" in name else 5e-6), name


def spilled_bytes(ptx, folder):
    """What the assembler that comes with Triton says about a kernel."""
    ptxas = importlib.import_module("triton.backends.nvidia.compiler").get_ptxas(90).path
    (folder / "kernel.ptx").write_text(ptx)
    command = [ptxas, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


@pytest.mark.skipif(kernel.interpreted(), reason="TRITON_INTERPRET is set")
@pytest.mark.parametrize(
    ("dtype", "group", "size"), [("bf16", 7, 128), ("fp16", 4, 64), ("fp32", 2, 64), ("bf16", 8, 80), ("bf16", 8, 256)]
)
def test_it_compiles_for_sm_90_without_spills(tmp_path, dtype, group, size):
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    constants = {"GROUP": group, "SIZE": size, "PAGE": 16, **kernel.blocks(group, size)}
    types = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr", "out_ptr"), f"*{dtype}")
    types |= {"tables_ptr": "*i64", "lengths_ptr": "*i64", "scale": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    function = kernel._prefix_attention_fwd_kernel
    signature = {name: types.get(name, "i32") for name in function.arg_names}
    source = compiler.ASTSource(function, signature, constexprs=constants)
    compiled = triton.compile(source, target=target)
    assert spilled_bytes(compiled.asm["ptx"], tmp_path) == 0
    assert compiled.metadata.shared <= 64 * 1024


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
