"""Memory for large outputs that is used again: fresh memory costs several times the work that fills it.

The system zeroes every fresh page at its first touch; for the 302 MB of a 12-megapixel image that took 9 times as long
as making its values. Here a block goes back to the pool when the last tensor, view or array on it is gone.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque

import numpy as np
import torch

SMALLEST = 1 << 20  # bytes; below, torch's own allocation is as good
ALIGNMENT = 64


class BufferPool:
    """Blocks that are free, at most `limit_bytes` of them. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes = {limit_bytes}: must be >= 0")
        self.limit_bytes = limit_bytes
        self._free: list[np.ndarray] = []  # the one used last is at the end
        self._returned: deque[np.ndarray] = deque()  # on their way into _free
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """Bytes held for later."""
        with self._lock:
            return sum(block.nbytes for block in [*self._free, *self._returned])

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor on the CPU, aligned to 64 bytes where it comes from the pool."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if size < SMALLEST:
            return torch.empty(shape, dtype=dtype)
        block = self._take(size_class(size))
        start = -block.ctypes.data % ALIGNMENT
        lease = block[start : start + size]
        weakref.finalize(lease, self._give_back, block).atexit = False
        return torch.from_numpy(lease).view(dtype).view(shape)  # the tensor's storage keeps the lease alive

    def release(self) -> None:
        """Gives all free blocks back to the system."""
        with self._lock:
            self._free.clear()
            self._returned.clear()

    def renew_lock(self) -> None:
        """For a process that was just forked."""
        self._lock = threading.Lock()

    def _take(self, size: int) -> np.ndarray:
        with self._lock:
            self._settle()
            for index in range(len(self._free) - 1, -1, -1):
                if self._free[index].nbytes == size + ALIGNMENT:
                    return self._free.pop(index)
        return np.empty(size + ALIGNMENT, dtype=np.uint8)

    def _give_back(self, block: np.ndarray) -> None:
        """Runs when a lease ends, which may be in a garbage collection while this very thread holds the lock; so it
        never waits for the lock: whoever holds it looks again after letting go."""
        self._returned.append(block)
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
        held = sum(block.nbytes for block in self._free)
        while held > self.limit_bytes:
            held -= self._free.pop(0).nbytes


def size_class(size: int) -> int:
    """The size of the block for `size` bytes: at most an eighth more, so that images of similar size share blocks."""
    step = 1 << max((size - 1).bit_length() - 4, 12)
    return -(-size // step) * step


outputs = BufferPool(limit_bytes=512 << 20)

if hasattr(os, "register_at_fork"):  # the thread that held the lock does not exist in the child
    os.register_at_fork(after_in_child=outputs.renew_lock)
