"""Memory of processes and of calls, in MiB. On the CPU as Linux tells it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def peak_mib(process: int | str = "self") -> float:
    """The most resident memory that a process has had. OSError, StopIteration: it is gone, or about to go."""
    return _status_kib("VmHWM", process) / 1024


def available_mib() -> float:
    """What this machine can give to new work."""
    return _kib("MemAvailable", Path("/proc/meminfo")) / 1024


def grown_mib(call: Callable[[], object]) -> float | None:
    """How much the resident memory grew at most during the call; None where the system does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except (OSError, AttributeError):
        return None
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 1024


def grown_on_gpu_mib(call: Callable[[], object]) -> float:
    """How much torch's memory on the GPU grew at most during the call."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _status_kib(key: str, process: int | str = "self") -> int:
    return _kib(key, Path(f"/proc/{process}/status"))


def _kib(key: str, path: Path) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
