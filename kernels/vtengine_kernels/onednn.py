"""float32 matrix products by oneDNN where it is faster than torch's own choice, MKL.

MKL takes its AVX2 kernels on AMD processors. From Zen 5 on a core has units of 512 bits, and oneDNN's AVX-512 kernels
were measured 1.7 to 2.3 times as fast (64 to 2,000 rows, 256 x 1,536 weights, one thread), forward and backward. Zen 4
runs such instructions in two halves: with weights of that size both reach 95 to 105 GFLOP/s there, MKL is up to 1.4
times as fast below 32 rows and compiles nothing; with 2,048 x 2,048 and more oneDNN is 1.15 to 1.5 times as fast.
"""

from __future__ import annotations

import functools
import math
import os
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

# What was compiled for a shape is kept, half a megabyte each: by torch for 1,024 shapes of each thread, by oneDNN for
# 1,024 more, unless told otherwise before the first product. Passes have another number of rows nearly every time, so
# that a process would grow by half a gigabyte.
for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(name, "256")
ZEN_4, ZEN_5 = 25, 26
"""Families of AMD processors; those of Zen 3 have no AVX-512."""
ZEN_4_ELEMENTS = 1 << 20
"""Of the smallest weight that oneDNN multiplies faster there."""


def onednn_is_better(weight: Tensor) -> bool:
    """Whether products with this weight [out, in] are faster by oneDNN: a matter of the processor and the size."""
    return weight.numel() >= _least_elements()


@functools.cache
def _least_elements() -> float:
    """inf: not an AMD processor with AVX-512, or the oneDNN operator is not there or gives wrong numbers."""
    try:
        family = _amd_family(Path("/proc/cpuinfo").read_text())
        if family < ZEN_4 or "AVX512" not in torch.backends.cpu.get_cpu_capability():
            return math.inf
        with torch.inference_mode():
            x, weight, bias = torch.eye(8, 16), torch.arange(48.0).view(3, 16), torch.ones(3)
            if not torch.equal(product(x, weight, bias), F.linear(x, weight, bias)):
                return math.inf
    except (OSError, AttributeError, RuntimeError):
        return math.inf
    return 0 if family >= ZEN_5 else ZEN_4_ELEMENTS


def _amd_family(cpuinfo: str) -> int:
    """0 for processors of others."""
    family = re.search(r"^cpu family\s*: (\d+)$", cpuinfo, re.MULTILINE)
    return int(family[1]) if family and "AuthenticAMD" in cpuinfo else 0


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """float32 x [N, in] @ weight [out, in].T + bias [out] -> [N, out], on the CPU; no gradients."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
