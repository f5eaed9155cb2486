"""CUDA graphs of functions over memory that stays where it is: captured once, replayed in one launch each."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
"""Up to 128 rows reading the weights takes longer than the products, so that rows that fill up a batch cost little."""
_CAPTURING = threading.Lock()
"""torch.cuda.graph asks for one capture at a time in a process."""

log = logging.getLogger(__name__)


def batch_sizes(max_rows: int) -> list[int]:
    """Batches are filled up to one of these."""
    return [*(size for size in BATCH_SIZES if size < max_rows), max_rows]


class Captures:
    """The graphs of an engine, by key: on one stream and in one pool, so that they share memory.

    What one returns is valid until the next one is replayed. Where a capture fails, there are none any more.
    capture False: the functions themselves are called, which is how they are tested where there is no CUDA.
    """

    def __init__(self, device: torch.device, capture: bool = True) -> None:
        self.failed = False
        self.replays: dict[Hashable, Callable[[], Tensor]] = {}
        self._device, self._capture = device, capture
        self._stream = torch.cuda.Stream(device) if capture else None  # torch's own is on the GPU that captured first
        self._memory = torch.cuda.graph_pool_handle() if capture else None

    def of(self, key: Hashable, function: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
        """The function captured, now or earlier; None: it could not be. It is called twice for a capture."""
        if self.failed:
            return None
        if key not in self.replays:
            try:
                self.replays[key] = self._captured(function) if self._capture else function
            except Exception as error:  # whatever it is, a pass without a graph may do without it
                self.failed = True
                self.replays.clear()  # what they share with the one that failed may be gone
                log.warning("decode steps run without CUDA graphs, which is slower: a capture failed: %r", error)
                return None
        return self.replays[key]

    def _captured(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph, stream, outside = torch.cuda.CUDAGraph(), self._stream, torch.cuda.current_stream(self._device)
        assert stream is not None
        # Not torch.cuda.graph: it empties torch's caches each time, and an error leaves the thread on its stream.
        with _CAPTURING:
            stream.wait_stream(outside)
            with torch.cuda.stream(stream):
                try:
                    function()  # a capture must neither compile a kernel nor set up a library
                finally:
                    outside.wait_stream(stream)  # for what it launched; a capture computes nothing
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
                try:
                    result = function()
                except Exception:
                    with contextlib.suppress(RuntimeError):  # which says no more than that there was an error before
                        graph.capture_end()
                    raise
                graph.capture_end()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
