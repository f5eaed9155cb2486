"""What kernels take on a GPU, without the way to them: calls are captured in a CUDA graph, and the graph is replayed.

One by one, short kernels are measured with Python's and the driver's time for a launch (some tens of microseconds),
which a decode step of the engine does not pay, because it is a graph as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

CACHES_BYTES = 256 << 20
"""Of all layers together: several times what a GPU's second-level cache holds."""
FEWEST_LAYERS, MOST_LAYERS = 4, 28


def layers_of(size: int) -> int:
    """How many caches of so many bytes to go through in turn, as a model does, so that each comes from memory."""
    return min(MOST_LAYERS, max(FEWEST_LAYERS, -(-CACHES_BYTES // size)))


def captured(call: Callable[[], object], times: int = 1) -> Callable[[], object]:
    """So many calls as one. A first call is made at once: in the capture nothing is compiled, planned or uploaded."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeat(call, times)
    return graph.replay


def repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()
