"""The engine as users run it on a GPU: 16 bits, graphs, and heads of Qwen2.5-VL-7B's sizes, which choose the kernels.

The same tests run on the CPU, where passes are padded as graphs have them; so what they expect is known to be right.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from tests.engine.harness import settle
from tests.engine.tiny import PAD, VIDEO, VOCAB, Letters, cold_logits, image, prompt, request, tiny_config
from tests.tiny_model import TINY_VISION, tiny_text
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.engine.embedded.captures import Captures
from vtengine.engine.embedded.families import Families
from vtengine.model import Qwen2_5_VL, hf_tensors

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
GRAPHS = pytest.mark.parametrize("cuda_graphs", [True, False])
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Of a logarithm of a probability. Random weights: another token or page in the cache changes them by 0.5 and more."""


def model_of(device, dtype, seed=0):
    """Two layers. Heads of 128 in groups of 7; in the tower of 80, and a gate of 3420 numbers."""
    text = replace(tiny_text(VOCAB), hidden_size=14 * 128, num_heads=14, num_kv_heads=2, mrope_section=(16, 24, 24))
    vision = replace(TINY_VISION, hidden_size=160, intermediate_size=3420, out_hidden_size=text.hidden_size)
    config = replace(tiny_config(), text=text, vision=vision)
    return Qwen2_5_VL.build(config, seed).eval().to(device, dtype).requires_grad_(False)


def served(model, use, cuda_graphs=True, **config):
    """What `use(engine)` returns, of an engine with pages of 16 as by default."""

    async def serve():
        sizes = EngineConfig(num_pages=400, max_batch_tokens=128, cuda_graphs=cuda_graphs, **config)
        engine = EmbeddedEngine(model, Letters(), sizes)
        if cuda_graphs and model.device.type == "cpu":
            engine.runner.use(Captures(model.device, capture=False))
        try:
            result = await use(engine)
            await settle(engine)
            assert not cuda_graphs or engine.runner.captures.replays
            return result
        finally:
            await engine.close()

    return asyncio.run(serve())


def assert_close(model, ask, completion):
    """To a pass without any cache over what was sampled, which also says that nothing better was to be had."""
    ids = torch.tensor(completion.token_ids, device=model.device)[:, None]
    logits = cold_logits(model, [*ask.token_ids, *completion.token_ids], ask.images)[len(ask.token_ids) - 1 : -1]
    logits = logits.float().index_fill(1, torch.tensor([PAD, VIDEO], device=model.device), -torch.inf)
    cold = logits.log_softmax(-1)
    found = torch.tensor(completion.logprobs, device=model.device)
    assert (found - cold.gather(1, ids)[:, 0]).abs().max() < TOLERANCE[model.dtype]
    assert (cold.max(1).values - cold.gather(1, ids)[:, 0]).max() < 2 * TOLERANCE[model.dtype]


def answers_are_cold(model, rows, cuda_graphs, new=6):
    """Rows of different lengths, some with images, begun in chunks; then second turns with an image more."""
    pictures = [image(1, h=8, w=12), image(2, h=10, w=6)]
    long = 1100 if model.device.type == "cuda" else 160  # in chunks; on a GPU in wider tables, too

    async def two_turns(engine):
        asks = []
        for k in range(rows):
            shown = pictures[:1] if k % 3 == 0 else []
            length = long if k == 5 else 5 + 7 * k % 90
            asks.append(request(f"r{k}", prompt(k, length, shown), shown, max_new_tokens=new))
        first = await asyncio.gather(*map(engine.generate, asks))
        for k in range(0, rows, 4):
            ids = (*asks[k].token_ids, *first[k].token_ids, *prompt(100 + k, 30, pictures[1:]))
            asks.append(request(f"again-{k}", ids, (*asks[k].images, pictures[1]), max_new_tokens=new))
        return asks, [*first, *await asyncio.gather(*map(engine.generate, asks[rows:]))]

    asks, completions = served(model, two_turns, cuda_graphs)
    assert any(completion.cached_tokens for completion in completions[rows:])
    for ask, completion in zip(asks, completions, strict=True):
        assert_close(model, ask, completion)


def siblings_are_cold(model, cuda_graphs, monkeypatch):
    """More than a program takes at once, with a stranger, whose common pages are read once for several of them."""
    shared, of = [], Families.of
    monkeypatch.setattr(Families, "of", lambda self, tables: shared.append(of(self, tables)) or shared[-1])
    length = 1104 if model.device.type == "cuda" else 160

    async def group(engine):
        begin = prompt(9, length)
        asks = [request(f"s{k}", [*begin, *prompt(k, 5 + 3 * k)], max_new_tokens=6) for k in range(10)]
        asks.append(request("stranger", prompt(50, 30), max_new_tokens=6))
        first = await engine.generate(asks[0])
        return asks, [first, *await asyncio.gather(*map(engine.generate, asks[1:]))]

    asks, completions = served(model, group, cuda_graphs, share_prefix=True)
    assert max(sum(found.shared.tolist()) for found in shared if found is not None) >= 5 * length
    for ask, completion in zip(asks, completions, strict=True):
        assert_close(model, ask, completion)


def new_weights_are_used(device, dtype):
    model, other = (model_of(device, dtype, seed) for seed in (0, 1))
    ask = request("a", prompt(1, 40), max_new_tokens=6)

    async def update(engine):
        before = await engine.generate(ask)
        await engine.load_weights(hf_tensors(other), 1)
        return before, await engine.generate(replace(ask, request_id="b"))

    before, after = served(model, update)
    assert before.token_ids != after.token_ids and after.weight_version == 1
    assert_close(other, ask, after)


@GRAPHS
@DTYPES
@pytest.mark.parametrize("rows", [1, 8])
def test_answers_are_those_of_a_pass_without_a_cache(dtype, rows, cuda_graphs):
    answers_are_cold(model_of("cpu", dtype), rows, cuda_graphs)


@pytest.mark.parametrize(  # without graphs the CPU gathers pages of 16 bits
    ("dtype", "cuda_graphs"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]
)
def test_siblings_answer_as_a_pass_without_a_cache(dtype, cuda_graphs, monkeypatch):
    siblings_are_cold(model_of("cpu", dtype), cuda_graphs, monkeypatch)


@DTYPES
def test_new_weights_are_used(dtype):
    new_weights_are_used("cpu", dtype)


@pytest.mark.gpu
@GRAPHS
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_answers_on_the_gpu(rows, cuda_graphs):
    answers_are_cold(model_of("cuda", torch.bfloat16), rows, cuda_graphs)


@pytest.mark.gpu
@GRAPHS
def test_siblings_on_the_gpu(cuda_graphs, monkeypatch):
    siblings_are_cold(model_of("cuda", torch.bfloat16), cuda_graphs, monkeypatch)


@pytest.mark.gpu
def test_graphs_use_new_weights():
    new_weights_are_used("cuda", torch.bfloat16)
