"""Captured decode steps without a GPU: a graph is the list of torch's operations, replayed on the same memory.

What is not written before a replay into memory that the capture saw does not reach the answers, and an operation that
reads a value back on the host fails as it would in a capture.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vtengine_kernels.layer_ops import native

from tests.engine.embedded.test_attention_paths import answers_are_cold
from tests.engine.tiny import tiny_model
from vtengine.engine.embedded import decode_graphs
from vtengine.engine.embedded.decode_graphs import DecodeGraphs

aten = torch.ops.aten
READS_BACK = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}


class Graph:
    """What stands for torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations = []

    def replay(self):
        for operation, arguments, options, results in self.operations:
            again = operation(*arguments, **options)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        assert operation not in READS_BACK, f"{operation} in a capture"
        results = operation(*arguments, **(options or {}))
        self.graph.operations.append((operation, arguments, options or {}, results))
        return results


class Stream:
    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        assert isinstance(other, Stream)


@pytest.fixture
def captures(monkeypatch):
    """torch.cuda as far as captures need it; a list of (pool, stream) of each capture."""
    found, current = [], Stream()

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"  # other threads prepare images meanwhile
        found.append((pool, stream))
        with Recording(graph):
            yield

    fake = SimpleNamespace(
        CUDAGraph=Graph, Stream=Stream, graph=capture, graph_pool_handle=object,
        current_stream=lambda: current, stream=lambda stream: nullcontext(),
    )  # fmt: skip
    for name, value in vars(fake).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return found


def paged(q, keys, values, tables, lengths, siblings, impl):
    """prefix_attention in torch's own operations, which a recording sees; our libraries' calls it does not."""
    heads = q.shape[1] // keys.shape[2]
    k, v = (pages[tables].flatten(1, 2).repeat_interleave(heads, 2).transpose(1, 2) for pages in (keys, values))
    seen = torch.arange(k.shape[2])[None, None, None] < lengths[:, None, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen)[:, :, 0]


def test_replayed_steps_answer_as_plain_passes_do(captures, monkeypatch):
    monkeypatch.setattr(decode_graphs, "prefix_attention", paged)
    monkeypatch.setattr(decode_graphs, "CONTEXT_TOKENS", (64, 256))
    monkeypatch.setattr(native, "takes", lambda x: False)
    engines, replays = [], []

    def prepare(engine):
        engines.append(engine)
        engine.runner.graphs = graphs = DecodeGraphs(engine.model, engine.runner.cache, engine.config.max_running)
        run = graphs.run
        graphs.run = lambda *arguments: replays.append(1) or run(*arguments)

    assert answers_are_cold(tiny_model(), prepare=prepare) == 8
    sizes = [size for size, *_ in engines[0].runner.graphs._replays]
    assert len(captures) == len(sizes) < len(replays) and {1, 8} <= set(sizes) <= {1, 2, 4, 8}
    ((_, stream),) = set(captures)  # one pool and one stream, or they would share no memory
    assert stream.device == engines[0].model.device


def test_a_capture_refuses_to_read_back(captures):
    graph = Graph()
    with pytest.raises(AssertionError, match="in a capture"), torch.cuda.graph(graph, 0, Stream(), "thread_local"):
        torch.ones(3).sum().item()
