"""Small arrays of the host for the device, in copies that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: what Triton compiles a kernel for; with less there would be one for each parity


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays, of any shapes, as tensors on the device. On the CPU they share the arrays' memory.

    On CUDA they are views of one tensor and travel through pinned memory in the order of the current stream: whoever
    calls this before launching a pass does not wait for it. A copy from ordinary memory would.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    return packed(arrays, device)


def send(array: np.ndarray, to: Tensor) -> None:
    """The array into memory of the device that stays where it is, in the order of the current stream."""
    staged = torch.from_numpy(array)
    to.copy_(staged.pin_memory() if to.is_cuda else staged, non_blocking=True)


def packed(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """`upload` in one copy, for dtypes of at most 8 bytes."""
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    staged = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    room = staged.numpy()
    for start, array in zip(starts, arrays, strict=True):
        room[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    sent = staged.to(device, non_blocking=True)  # the host allocator keeps the pinned memory until the copy is done
    return [
        sent[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]
