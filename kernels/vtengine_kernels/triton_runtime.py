"""Whether Triton's kernels can run here, and where."""

from __future__ import annotations

import functools
import importlib.util
import os


@functools.cache
def missing() -> str | None:
    """Why there is no Triton here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; on a CUDA machine: `pip install triton`"
    return None


def interpreted() -> bool:
    """Whether Triton kernels run on the CPU, in Python."""
    return os.environ.get("TRITON_INTERPRET") == "1"
