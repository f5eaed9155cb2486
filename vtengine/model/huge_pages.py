"""Memory in pages of 2 MiB, where Linux gives them to who asks (transparent_hugepage = madvise, or always)."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterable

from torch import Tensor

LEAST_BYTES = 1 << 24
"""Of a tensor: what the pages at its ends lose of the advantage is little."""


def prefer_huge_pages(tensors: Iterable[Tensor]) -> None:
    """For large tensors on the CPU that nothing was written to yet: filling them then takes a 500th of the page faults,
    and reading them misses the TLB less. Where the system knows no such pages, nothing happens."""
    advice, advise = getattr(mmap, "MADV_HUGEPAGE", None), _madvise()
    if advice is None or advise is None:
        return
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type == "cpu" and size >= LEAST_BYTES:
            begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            advise(begin, (tensor.data_ptr() + size - begin) // mmap.PAGESIZE * mmap.PAGESIZE, advice)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
