"""Where and with what a result came about: commit, machine, versions, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

CPU_FEATURES = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd"
)  # fmt: skip
"""Those that kernels, ours or the libraries', choose their code by; named as Linux does."""
PACKAGES = (
    "torch", "triton", "numpy", "pillow", "transformers", "tokenizers", "sglang", "opencv-python-headless",
    "torchvision", "hf-processors-rs", "flashinfer-python", "liger-kernel", "cut-cross-entropy",
)  # fmt: skip
"""Those whose versions a number may depend on."""
NOT_CODE = ("benchmarks/results", "docs", "README.md")


def stamp(folder: Path, untracked: bool = False) -> dict[str, Any]:
    """Everything that must stand beside a number, as JSON data.

    commit, dirty: of the git checkout that `folder` belongs to: whether code differs from the commit, files that git
    does not know included where `untracked`; without a checkout None and True.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    code = (":/", *(f":(top,exclude){path}" for path in NOT_CODE))
    changed = _git(folder, "status", "--porcelain", f"--untracked-files={'normal' if untracked else 'no'}", "--", *code)
    return {
        "commit": commit,
        "dirty": bool(changed) if commit else True,
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine() -> dict[str, Any]:
    """CPU and its features, usable cores, memory (GiB), the GPUs that torch sees, the system."""
    return {
        "cpu": cpu_name(),
        "features": cpu_features(),
        "cores": usable_cores(),
        "memory_gib": memory_gib(),
        "gpu": _gpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of Python, and of those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The model's name; the architecture's where the system does not tell it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those of CPU_FEATURES that this processor has, as far as the system tells."""
    flags = set((_cpuinfo("flags") or _cpuinfo("features")).split())
    return [name for name in CPU_FEATURES if name in flags]


def usable_cores() -> int | None:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory_gib() -> float | None:
    """Of the machine; None where the system does not tell."""
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
    return round(pages * size / 2**30, 1)


def _gpus() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)} (CUDA {torch.version.cuda})"


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in lines if name.strip().lower() == key), "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
