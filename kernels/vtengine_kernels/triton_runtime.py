"""Whether Triton's kernels can run here, and on which device."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@functools.cache
def missing() -> str | None:
    """Why there is no Triton here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; on a CUDA machine: `pip install triton`"
    return None


@functools.cache  # every op asks at every call, and Triton itself looks once, when it makes a kernel
def interpreted() -> bool:
    """Whether Triton kernels run on the CPU, in Python."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def generation(tensor: Tensor) -> int:
    """Of the tensor's GPU, the first number of its compute capability; on the CPU a Hopper's."""
    import torch

    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 9


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](...) on the device of the first argument, a tensor.

    Triton itself launches on the current device of the thread, and every new thread begins on the first GPU.
    """
    import torch

    first = arguments[0]
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)
