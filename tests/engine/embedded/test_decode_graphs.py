"""Captured decode steps without a GPU: a graph is the list of torch's operations, replayed on the same memory.

What is not written before a replay into memory that the capture saw does not reach the answers, and an operation that
reads a value back on the host fails as it would in a capture.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vtengine_kernels import layer_ops, token_sample
from vtengine_kernels.prefix_attention import Siblings

from tests.engine.embedded.test_attention_paths import answers_are_cold
from tests.engine.harness import assert_cold, run
from tests.engine.tiny import Letters, prompt, request, tiny_model
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig, attention, decode_graphs, runner
from vtengine.engine.embedded.attention import KVCache
from vtengine.engine.embedded.captures import Captures
from vtengine.engine.embedded.decode_graphs import DecodeGraphs
from vtengine.engine.embedded.head_graphs import WAYS
from vtengine.engine.embedded.runner import Runner
from vtengine.engine.embedded.sampled import Sampled

aten = torch.ops.aten
READS_BACK = {
    *(aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default),  # the last two in inference mode
    *(aten.nonzero.default, aten.equal.default, aten.masked_select.default),
}


class Graph:
    """What stands for torch.cuda.CUDAGraph."""

    def __init__(self, cuda):
        self.cuda, self.operations, self.is_invalid = cuda, [], False

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"  # other threads prepare images meanwhile
        self.stream = self.cuda.current
        self.cuda.captures.append((pool, self.stream))
        self.recording = Recording(self)
        self.recording.__enter__()

    def capture_end(self):
        self.recording.__exit__(None, None, None)
        assert self.cuda.current is self.stream is not self.cuda.default
        if self.is_invalid:
            raise RuntimeError("operation failed due to a previous error during capture")

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
        self.graph.is_invalid |= operation in READS_BACK
        assert not self.graph.is_invalid, f"{operation} in a capture"
        results = operation(*arguments, **(options or {}))
        self.graph.operations.append((operation, arguments, options or {}, results))
        return results


class Stream:
    def __init__(self, device=None):
        self.device = device
        self.waits = []

    def wait_stream(self, other):
        assert isinstance(other, Stream)
        self.waits.append(other)


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as far as captures need it. captures: (pool, stream) of each."""
    default = Stream()
    cuda = SimpleNamespace(captures=[], default=default, current=default)

    @contextmanager
    def on(stream):
        cuda.current, before = stream, cuda.current
        try:
            yield
        finally:
            cuda.current = before

    fake = {
        "CUDAGraph": lambda: Graph(cuda), "Stream": Stream, "graph_pool_handle": object,
        "current_stream": lambda device: cuda.current, "stream": on,
    }  # fmt: skip
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(decode_graphs, "prefix_attention", paged)
    monkeypatch.setattr(decode_graphs, "CONTEXT_TOKENS", (64, 256))
    for op in (layer_ops, token_sample):  # a recording sees torch's own operations, not our libraries' calls
        monkeypatch.setattr(op.native, "takes", lambda x: False)
    return cuda


def paged(q, keys, values, tables, lengths, siblings, impl):
    """prefix_attention in torch's own operations."""
    heads = q.shape[1] // keys.shape[2]
    k, v = (pages[tables].flatten(1, 2).repeat_interleave(heads, 2).transpose(1, 2) for pages in (keys, values))
    seen = torch.arange(k.shape[2])[None, None, None] < lengths[:, None, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen)[:, :, 0]


def use_graphs(engine):
    engine.runner.use(Captures(engine.model.device))
    return engine.runner.captures


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "seed": 3, "top_p": 0.8}]
)
@pytest.mark.parametrize("overlap", [False, True])
def test_replayed_steps_answer_as_plain_passes_do(cuda, overlap, sampling):
    engines, replays = [], []

    def prepare(engine):
        engines.append(engine)
        use_graphs(engine)
        graphs = engine.runner._graphs
        run = graphs.run
        graphs.run = lambda *arguments: replays.append(1) or run(*arguments)

    plain = [] if sampling else None  # no pass without a cache knows what is sampled
    if sampling:
        assert answers_are_cold(tiny_model(), answers=plain, **sampling) == 8
    assert answers_are_cold(tiny_model(), prepare=prepare, overlap=overlap, answers=plain, **sampling) == 8
    keys = list(engines[0].runner.captures.replays)
    assert {size for name, size, *_ in keys if name == "decode"} >= {1, 8}
    assert {size for _, size, *_ in keys} <= {1, 2, 4, 8}
    assert len(cuda.captures) == len(keys) < len(replays)
    ways = {tuple(ways) for name, _, *ways in keys if name == "head"}
    assert ways == {(False, 2) if "top_p" in sampling else (False, 1) if sampling else (True, 0)}
    ((_, stream),) = set(cuda.captures)  # one pool and one stream, or they would share no memory
    assert stream.device == engines[0].model.device


def test_they_are_captured_before_the_first_request(cuda):
    """Over rows of their own, the largest first, as far as the pool can need them; serving captures no more."""
    engines = []

    def prepare(engine):
        engines.append(engine)
        use_graphs(engine)
        engine.runner.warm_up()
        cache = engine.runner.cache
        assert not any(tensor[: cache.spare_page].any() for tensor in (*cache.keys, *cache.values))
        assert all(tensor[cache.spare_page].any() for tensor in cache.keys)

    assert answers_are_cold(tiny_model(), prepare=prepare) == 8
    sizes = (64, 32, 16, 8, 4, 2, 1)
    keys = [("decode", size, width, 0) for width in (64, 16) for size in sizes]
    keys += [("head", size, *ways) for size in sizes for ways in WAYS]
    assert list(engines[0].runner.captures.replays) == keys and len(cuda.captures) == len(keys)
    cuda.captures.clear()
    cpu = torch.device("cpu")
    small = KVCache(2, 20, 4, 2, 16, torch.float32, cpu)
    DecodeGraphs(tiny_model(), small, Sampled(2, cpu), Captures(cpu)).capture()
    assert len(cuda.captures) == 4  # two sizes, tables of 16 and of 20 pages


@pytest.mark.parametrize("page_size", [1, 4, 128])
@pytest.mark.parametrize("prefill_in_place", [False, True])
def test_kernels_are_compiled_over_a_page_that_nobody_has(monkeypatch, page_size, prefill_in_place):
    """By rows for every kernel of a pass, and samples in every way; nothing of it stays."""
    called = []
    for name in ("paged_prefill", "prefix_attention"):
        kernel = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, n=name, kernel=kernel: called.append(n) or kernel(*a))
    monkeypatch.setattr(attention, "prefill_available", lambda keys: prefill_in_place)

    async def warm(engine):
        cache = engine.runner.cache
        engine.runner._warm_up_pass()
        engine.runner._head.warm_up()
        assert not any(tensor[: cache.spare_page].any() for tensor in (*cache.keys, *cache.values))
        assert all(tensor[cache.spare_page].any() and tensor.isfinite().all() for tensor in cache.keys)
        assert set(called) == {"prefix_attention"} | ({"paged_prefill"} if prefill_in_place else set())
        ask = request("after", prompt(1, 20))
        return ask, await engine.generate(ask)

    ask, completion = run(warm, page_size=page_size)
    assert_cold(completion, ask)


@pytest.mark.parametrize("call", [3, 4])  # each capture calls it twice: before, and in it
@pytest.mark.parametrize("at_once", [False, True])
def test_where_a_capture_fails_the_engine_goes_on_without(cuda, caplog, at_once, call):
    failing, calls = [], []

    def prepare(engine):
        captures = use_graphs(engine)
        graphs = engine.runner._graphs
        forward = graphs._forward

        def breaks(*key):
            calls.append(key)
            if len(calls) == call:
                failing.append(captures)
                if call == 4:
                    torch.ones(1).item()
                raise torch.OutOfMemoryError("out of memory")
            return forward(*key)

        graphs._forward = breaks
        if at_once:
            engine.runner.warm_up()

    answered = answers_are_cold(tiny_model(), prepare=prepare)
    (captures,) = failing
    assert answered == 8 and captures.failed and not captures.replays
    assert len(cuda.captures) == call // 2 or not at_once
    assert cuda.current is cuda.default
    assert len(cuda.default.waits) == len(cuda.captures) + call % 2  # for what ran before each, or failed there
    (warning,) = caplog.records
    assert "without CUDA graphs" in warning.getMessage()
    assert ("in a capture" if call == 4 else "out of memory") in warning.getMessage()


def test_there_is_room_for_what_siblings_take_with_pages_of_any_size():
    rows, page_size, heads = 2, 48, 1
    cache = KVCache(1, 700, page_size, heads, 1, torch.float32, torch.device("cpu"))
    graphs = DecodeGraphs(tiny_model(), cache, Sampled(rows, cache.keys[0].device), None)
    layout = SimpleNamespace(length=np.full(rows, graphs._widths[-1] * page_size))
    assert layout.length[0] > decode_graphs.CONTEXT_TOKENS[-1]  # what the widest tables hold
    graphs._set_work(Siblings.strangers(rows), layout, rows)


@pytest.mark.parametrize("inference", [False, True])
def test_a_capture_refuses_to_read_back(cuda, inference):
    graph = Graph(cuda)
    with torch.inference_mode(inference):
        graph.capture_begin(0, "thread_local")
        with pytest.raises(AssertionError, match="in a capture"):
            torch.ones(3).sum().item()
        graph.recording.__exit__(None, None, None)


def test_the_engine_has_them_captured_where_they_are_replayed_or_has_none(cuda, monkeypatch):
    """The worker does it, before the engine is there to be used."""
    threads = []

    monkeypatch.setattr(runner, "capturable", lambda keys: "ref")
    capture = DecodeGraphs.capture
    monkeypatch.setattr(
        DecodeGraphs, "capture", lambda self: threads.append(threading.current_thread()) or capture(self)
    )
    for cuda_graphs in (True, False):
        engine = EmbeddedEngine(tiny_model(), Letters(), EngineConfig(num_pages=16, cuda_graphs=cuda_graphs))
        assert (engine.runner.captures is not None) is cuda_graphs and threads == [engine.worker.thread] * cuda_graphs
        assert bool(cuda.captures) is cuda_graphs
        asyncio.run(engine.close())
        threads.clear()
        cuda.captures.clear()


def test_an_engine_that_loses_its_device_in_the_captures_is_none(monkeypatch):
    """Neither is anybody left waiting, nor told no more than that it is closed."""

    def lost(_):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(Runner, "warm_up", lost)
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="the device is lost"):
        EmbeddedEngine(tiny_model(), Letters(), EngineConfig(num_pages=16))
    assert before.issuperset(threading.enumerate())
