"""Kernels run on the device of their tensors, whichever is the current one of the thread that launches them."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import vtengine_kernels
from vtengine_kernels import triton_runtime

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
