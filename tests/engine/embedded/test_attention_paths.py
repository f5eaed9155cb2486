"""Every way to attend gives the same answers: the C++ kernel, gathered pages, the Triton kernel interpreted."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vtengine_kernels.prefix_attention import native, triton

from tests.engine.tiny import Letters, cold_greedy, image, prompt, request, tiny_model
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig, attention
from vtengine.engine.embedded.captures import Captures

ROOT = Path(__file__).resolve().parents[3]


def answers_are_cold(model, count=5, new=6, prepare=lambda engine: None, overlap=None, answers=None, **sampling):
    """Siblings, a second turn and different lengths, at once; returns the number of checked requests.

    answers: of the same requests before, to compare with (empty: these are put there).
    """
    picture = image(1)
    sampling = {"max_new_tokens": new} | sampling

    async def serve():
        config = EngineConfig(page_size=4, num_pages=200, max_batch_tokens=64, overlap=overlap)
        engine = EmbeddedEngine(model, Letters(), config)
        prepare(engine)
        try:
            asks = [request(f"r{k}", prompt(k, 5 + 4 * k), **sampling) for k in range(count)]
            asks += [request(f"s{k}", prompt(9, 17, [picture]), [picture], **sampling) for k in range(2)]
            first = await asyncio.gather(*map(engine.generate, asks))
            ids = [*asks[0].token_ids, *first[0].token_ids, *prompt(3, 40)]
            asks.append(request("turn-2", ids, **sampling))
            return asks, [*first, await engine.generate(asks[-1])]
        finally:
            await engine.close()

    asks, completions = asyncio.run(serve())
    expected = answers or [(c.token_ids, c.logprobs) for c in completions]
    if answers is None:
        expected = [cold_greedy(model, ask.token_ids, ask.images, new) for ask in asks]
    elif not answers:
        answers += expected
    for completion, (ids, logprobs) in zip(completions, expected, strict=True):
        assert completion.token_ids == ids
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert completions[-1].cached_tokens > 0
    return len(asks)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_with_the_compiled_kernel():
    assert attention.available(attention.KVCache(1, 2, 4, 2, 16, tiny_model().dtype, tiny_model().device).keys[0])
    assert answers_are_cold(tiny_model()) == 8


def test_with_gathered_pages(monkeypatch):
    monkeypatch.setattr(attention, "available", lambda keys: False)
    assert answers_are_cold(tiny_model()) == 8


def test_with_long_rows_in_place(monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "prefill_available", lambda keys: True)
    prefill = attention.paged_prefill
    monkeypatch.setattr(attention, "paged_prefill", lambda *args: calls.append(args[-1]) or prefill(*args))
    assert answers_are_cold(tiny_model()) == 8
    assert max(calls) > attention.SHORT_ROW_TOKENS


def test_with_padded_decode_batches_as_graphs_have_them():
    sizes = []

    def prepare(engine):
        engine.runner.use(Captures(engine.model.device, capture=False))
        graphs = engine.runner._graphs
        forward = graphs._forward
        graphs._forward = lambda size, *rest: sizes.append(size) or forward(size, *rest)

    assert answers_are_cold(tiny_model(), prepare=prepare) == 8
    assert set(sizes) <= {1, 2, 4, 8} and max(sizes) == 8 and min(sizes) == 1


@pytest.mark.gpu
def test_on_the_gpu():
    captured = []
    assert answers_are_cold(tiny_model().cuda(), prepare=lambda engine: captured.append(engine.runner.captures)) == 8
    assert captured[0].replays


@pytest.mark.gpu
def test_on_the_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU here")
    assert answers_are_cold(tiny_model().to("cuda:1")) == 8


@pytest.mark.gpu
def test_on_the_gpu_without_graphs():
    assert answers_are_cold(tiny_model().cuda(), prepare=lambda engine: engine.runner.use(None)) == 8


@pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))
def test_with_the_triton_kernel_interpreted():
    code = (
        "from tests.engine.embedded.test_attention_paths import *\n"
        "model = tiny_model()\n"
        "calls = []\n"
        "run = triton.prefix_attention\n"
        "triton.prefix_attention = lambda *a: calls.append(1) or run(*a)\n"
        "from vtengine_kernels.token_sample import triton as sampling\n"
        "sampled = []\n"
        "sample = sampling.token_sample\n"
        "sampling.token_sample = lambda *a: sampled.append(1) or sample(*a)\n"
        "pad = lambda engine: engine.runner.use(Captures(model.device, capture=False))\n"
        "assert answers_are_cold(model, count=2, new=3, prepare=pad, overlap=True) == 5\n"
        "assert len(calls) > 4 < len(sampled)\n"
    )
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
