"""Which processors oneDNN multiplies on, and how much of what it compiles is kept."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from vtengine_kernels import onednn

SMALL, LARGE = torch.empty(1536, 256), torch.empty(2048, 2048)


@pytest.fixture(autouse=True)
def _ask_anew():
    onednn._least_elements.cache_clear()
    yield
    onednn._least_elements.cache_clear()


@pytest.mark.parametrize(
    ("vendor", "family", "level", "small", "large"),
    [
        ("AuthenticAMD", 26, "AVX512", True, True),
        ("AuthenticAMD", 25, "AVX512", False, True),
        ("AuthenticAMD", 26, "AVX2", False, False),
        ("GenuineIntel", 26, "AVX512", False, False),
    ],
)
def test_by_processor_and_size(vendor, family, level, small, large, monkeypatch):
    text = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 17\n"
    monkeypatch.setattr(onednn.Path, "read_text", lambda path: text)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(onednn, "product", F.linear)
    assert [onednn.onednn_is_better(weight) for weight in (SMALL, LARGE)] == [small, large]


def test_a_wrong_product_is_not_better(monkeypatch):
    monkeypatch.setattr(onednn, "_amd_family", lambda text: onednn.ZEN_5)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(onednn, "product", lambda x, weight, bias: torch.zeros(len(x), len(weight)))
    assert not onednn.onednn_is_better(LARGE)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_does_not_grow_with_every_number_of_rows():
    """Half a megabyte for each shape: 420 MB where torch and oneDNN keep as many as they do by themselves."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN product")
    code = """
import resource, torch
from vtengine_kernels.onednn import product
torch.set_num_threads(1)
weights = [torch.zeros(out, 64) for out in (64, 96, 128, 160)]
def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
with torch.inference_mode():
    product(torch.zeros(4, 64), weights[0])
    before = megabytes()
    for rows in range(5, 230):
        for weight in weights:
            product(torch.zeros(rows, 64), weight)
print(megabytes() - before)
"""
    free = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    grown = float(subprocess.run([sys.executable, "-c", code], env=free, capture_output=True, check=True).stdout)
    assert grown < 250
