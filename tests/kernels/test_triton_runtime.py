"""Kernels run on the device of their tensors, whichever is the current one of the thread that launches them."""

from __future__ import annotations

import ast
import importlib
import itertools
import random
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vtengine_kernels
from vtengine_kernels import triton_runtime
from vtengine_kernels.paged_prefill import triton as paged_prefill
from vtengine_kernels.patchify import Target, contract
from vtengine_kernels.patchify import triton as patchify
from vtengine_kernels.prefix_attention import split
from vtengine_kernels.shared_prefix_attention import merge

from vtengine.vision.plan import PixelLimits, plan_high, plan_low

KERNELS = Path(vtengine_kernels.__file__).parent


class Gpus:
    """Two of them; the first is current."""

    def __init__(self, monkeypatch):
        self.current, self.launched = 0, []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.device)

    @contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before

    def __getitem__(self, grid):
        """As a kernel: kernel[grid](...)."""
        return lambda *arguments, **constants: self.launched.append((self.current, grid, len(arguments), constants))


def test_a_kernel_is_launched_where_its_tensors_are(monkeypatch):
    gpus = Gpus(monkeypatch)
    for index in (1, 0):
        tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        triton_runtime.launch(gpus, (3, 4), tensor, 7, BLOCK=16)
        assert gpus.current == 0
    triton_runtime.launch(gpus, (3, 4), torch.zeros(2), 7, BLOCK=16)  # interpreted, on the CPU
    assert gpus.launched == [(device, (3, 4), 2, {"BLOCK": 16}) for device in (1, 0, 0)]


def test_no_kernel_is_launched_past_it():
    found = []
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                found.append((path.relative_to(KERNELS).as_posix(), ast.unparse(node.func)))
    launches = [place for place in found if "_kernel" in place[1] or place[0] == "triton_runtime.py"]
    assert set(launches) == {("triton_runtime.py", "kernel[grid]")}


@pytest.fixture
def compilations(monkeypatch):
    """Kernels that the launches since then would have compiled on a Hopper: (name, what Triton specialises on)."""
    if triton_runtime.missing() is not None or triton_runtime.interpreted():
        pytest.skip("needs Triton, compiled")
    jit, compiler = (importlib.import_module(f"triton.{name}") for name in ("runtime.jit", "compiler.compiler"))
    backend = compiler.make_backend(importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32))
    found = set()

    def launch(kernel, grid, *arguments, **constants):
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        found.add((kernel.__name__, str(bind(*arguments, **constants)[1])))

    for module in (patchify, paged_prefill, split, merge):
        monkeypatch.setattr(module, "launch", launch)
    return found


def test_few_kernels_are_compiled_for_images_of_any_size(compilations):
    """A compilation takes about a second, during which whoever sent the image waits, and others too."""
    draw = random.Random(0)
    for number in range(40):
        width, height = (draw.randint(2, 25) * 16 if number % 4 == 0 else draw.randint(30, 400) for _ in range(2))
        high = plan_high(width, height, PixelLimits())
        views = [Target(plan.height, plan.width) for plan in (plan_low(high), high)]
        image = torch.zeros(height, width, 3, dtype=torch.uint8)
        patchify.run(contract.checked_plan(image, views, layout="compact", dtype=torch.bfloat16))
    assert {name for name, _ in compilations} == {"_across_kernel", "_down_kernel", "_down_patches_kernel"}
    assert len(compilations) <= 24


def test_contexts_of_any_length_share_their_kernels(compilations):
    q, cache = torch.zeros(3, 4, 16), torch.zeros(2, 5, 8, 2, 16)
    lengths, offsets = torch.ones(3, dtype=torch.int64), torch.arange(4)
    for pages in (1, 2, 15, 16, 31, 32, 64, 100):
        tables = torch.zeros(3, pages, dtype=torch.int64)
        split.split_attention(q, *cache, tables, lengths, 0.25, None)
        paged_prefill.paged_prefill(q, *cache, tables, lengths, offsets, 1)
    assert sorted(name for name, _ in compilations) == ["_merge_spans_kernel", "_paged_prefill_kernel", "_span_kernel"]


def test_packs_of_any_length_share_their_kernels(compilations, monkeypatch):
    monkeypatch.setattr(merge, "has_triton", lambda x: True)
    for tokens, first in itertools.product((2, 16, 17, 40), (0, 1)):
        out, lse = torch.zeros(tokens, 4, 16), torch.zeros(4, tokens)
        for count in range(1, tokens - first):
            merge.merge_(out, lse, out[:count], lse[:, :count], slice(first, first + count))
    assert len(compilations) == 1
