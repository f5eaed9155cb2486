"""Memory of this process: what it has held at most, and what it can have of a GPU."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 1 << 30
_RSS_UNIT = 1 if sys.platform == "darwin" else 1 << 10
"""Bytes in which the system counts resident memory."""


def peak_memory_gib(device: torch.device) -> float:
    """On a GPU what torch has allocated there since the last call, else resident memory since the process began."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    return peak / GIB


def gpu_bytes(device: torch.device) -> int:
    """What torch holds of a GPU in this process, and what is free there."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
