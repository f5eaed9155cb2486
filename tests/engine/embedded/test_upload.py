"""What the host sends before a pass: every array unchanged, all in one copy, and before the pass is launched."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from tests.engine.tiny import Letters, prompt, request, tiny_model
from vtengine.engine.base import SamplingParams
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig, sampler
from vtengine.engine.embedded.upload import packed, upload

CPU = torch.device("cpu")


@pytest.mark.parametrize("send", [upload, packed])
def test_arrays_of_all_kinds_arrive_unchanged(send):
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(-9, 9, 3).astype(np.int32),  # 12 bytes: what follows would lie askew
        rng.random((2, 5)),
        np.zeros(0, dtype=np.float32),
        rng.integers(-(2**60), 2**60, (3, 4)).T,
        np.float32([[1.5], [-np.inf]]),
    ]
    found = send(arrays, CPU)
    for array, tensor in zip(arrays, found, strict=True):
        assert tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)
    assert send([], CPU) == []
    if send is packed:
        assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1
        assert all(tensor.data_ptr() % 16 == 0 for tensor in found)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_limits_lie_alike_however_many_rows_have_them(monkeypatch, rows):
    """A kernel is compiled for where its arguments lie: in the middle of a batch nobody is to wait for another."""
    monkeypatch.setattr(sampler, "upload", packed)
    params = [SamplingParams(temperature=0.5 + k, top_p=0.5 + k / 10, top_k=k + 1, min_p=k / 10) for k in range(rows)]
    plan = sampler.SamplingPlan.build([SamplingParams(), *params], [0] * (rows + 1), [7], 256, CPU)
    greedy, limited = plan.parts
    assert (greedy.kind, limited.kind) == (0, 2) and limited.index.tolist() == list(range(1, rows + 1))
    for name in ("temperature", "top_p", "top_k", "min_p"):
        found = getattr(limited, name)
        assert found.tolist() == pytest.approx([getattr(p, name) for p in params]) and found.data_ptr() % 16 == 0


@pytest.mark.gpu
def test_what_goes_to_the_gpu_arrives_unchanged():
    arrays = [np.arange(1000), np.random.default_rng(0).random((64, 3))]
    for _ in range(100):  # the pinned memory of one is that of another, soon
        arrays = [array + 1 for array in arrays]
        found = upload(arrays, torch.device("cuda"))
    for array, tensor in zip(arrays, found, strict=True):
        assert tensor.is_cuda and np.array_equal(tensor.cpu().numpy(), array)


def test_what_sampling_needs_is_sent_before_the_pass(monkeypatch):
    model, events = tiny_model(), []
    decode = model.decode
    model.decode = lambda *args: events.append("pass") or decode(*args)
    monkeypatch.setattr(sampler, "upload", lambda *args: events.append("sent") or upload(*args))

    async def serve():
        engine = EmbeddedEngine(model, Letters(), EngineConfig(page_size=4, num_pages=50))
        try:
            await engine.generate(request("one", prompt(1, 9), max_new_tokens=3, temperature=1.0))
        finally:
            await engine.close()

    asyncio.run(serve())
    expected = ["sent", "sent", "pass", *["sent", "pass"] * 2]  # parameters and random numbers; then only these
    assert events[: len(expected)] == expected and set(events[len(expected) :]) <= {"pass"}
