"""float32 matrix products by oneDNN on AMD processors with AVX-512, where torch's own choice is MKL.

MKL takes its AVX2 kernels there; oneDNN's AVX-512 ones were measured 1.7 to 2.3 times as fast (64 to 2,000 rows,
256 x 1,536 weights, one thread), forward and backward.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

# oneDNN keeps what it compiled for a shape, of 1,024 shapes unless told otherwise before its first product. Passes have
# another number of rows nearly every time, so that a process would grow by hundreds of megabytes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")


@functools.cache
def onednn_is_better() -> bool:
    """Whether this is an AMD processor with AVX-512, and the oneDNN operator is there and gives the right numbers."""
    try:
        if (
            "AuthenticAMD" not in Path("/proc/cpuinfo").read_text()
            or "AVX512" not in torch.backends.cpu.get_cpu_capability()
        ):
            return False
        with torch.inference_mode():
            x, weight, bias = torch.eye(8, 16), torch.arange(48.0).view(3, 16), torch.ones(3)
            return torch.equal(product(x, weight, bias), F.linear(x, weight, bias))
    except (OSError, AttributeError, RuntimeError):
        return False


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """float32 x [N, in] @ weight [out, in].T + bias [out] -> [N, out], on the CPU; no gradients."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
