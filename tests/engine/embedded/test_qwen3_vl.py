"""Qwen3-VL in the engine: the tokens of a plain pass, whatever is chunked or reused, and those of transformers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.engine.embedded.test_encode_ahead import somebody_runs, tower
from tests.engine.harness import assert_cold, mixed_requests, run
from tests.engine.tiny import PAD, STOP, VIDEO, VOCAB, image, prompt, request
from tests.tiny_model import QWEN3_VISION, byte_encoder, config_of, qwen3_text
from vtengine.engine.base import Request, SamplingParams
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.model import Qwen3_VL, save_model
from vtengine.protocol.conversation import Limits
from vtengine.protocol.profile import load_profile
from vtengine.rollout.episode import run_episode
from vtengine.rollout.question import Question
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.vision.pipeline import ImagePipeline
from vtengine.vision.plan import PixelLimits

IDS = {"image_token_id": PAD, "video_token_id": VIDEO, "vision_start_token_id": 253, "vision_end_token_id": 254}
CONFIG = replace(
    config_of(qwen3_text(), QWEN3_VISION), text=qwen3_text(VOCAB), eos_token_id=STOP, bos_token_id=None, **IDS
)
MODEL = Qwen3_VL.build(CONFIG, 0).eval().requires_grad_(False)
CALL = '<think>too small</think><tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
HALF = (0.5, 0.5, 0.5)


def picture(seed, h=4, w=6, frames=1):
    """Random pixels; frames 2: the layout with both."""
    pixels = torch.randn(h * w, 3, 1, 256, generator=torch.Generator().manual_seed(seed))
    return replace(image(seed, h, w), pixel_values=pixels.expand(-1, -1, frames, -1).reshape(h * w, -1), patch=16)


PICTURES = [picture(1), picture(2, h=6, w=6, frames=2), picture(3, h=2, w=2)]


def requests(count=6):
    return [request(f"r{k}", prompt(k, 6 + 5 * k, PICTURES[: k % 4]), PICTURES[: k % 4]) for k in range(count)]


@pytest.mark.parametrize(
    "config", [{}, {"max_batch_tokens": 8}, {"num_pages": 40}, {"resume": False}, {"vision_cache_bytes": 0}], ids=str
)
def test_equals_a_plain_pass(config):
    asked = requests()

    async def both(engine):
        first = await asyncio.gather(*map(engine.generate, asked))
        again = await asyncio.gather(*(engine.generate(replace(r, request_id=f"{r.request_id}b")) for r in asked))
        return [*first, *again]

    for completion, ask in zip(run(both, MODEL, **config), asked * 2, strict=True):
        assert_cold(completion, ask, MODEL)


def test_features_from_the_other_thread_and_from_the_cache():
    """The deepstack columns travel with the features of an image."""
    asked = [request(f"r{k}", prompt(k, 9, PICTURES), PICTURES) for k in range(3)]

    async def body(engine):
        with tower(engine) as (go, runs):
            await somebody_runs(engine)
            go.set()
            done = await asyncio.gather(*map(engine.generate, asked))
            engine.cancel("text")
            assert sorted(name for names in runs for name in names) == [picture.content_hash for picture in PICTURES]
        assert engine.stats()["vision_cache_bytes"] == sum(p.visual_tokens for p in PICTURES) * 3 * 64 * 4
        return done

    for completion, ask in zip(run(body, MODEL, encode_ahead=True, num_pages=600), asked, strict=True):
        assert_cold(completion, ask, MODEL)


def test_patches_of_the_other_family_are_refused():
    with pytest.raises(ValueError, match=r"images\[0\]\.pixel_values is \[24, 588\].*\(1536, 768\)"):
        run(lambda engine: engine.generate(mixed_requests(2)[1]), MODEL)


class Insisting:
    """Serves like the engine, but turn 1 is made to ask for the high view: nobody taught the random model to."""

    def __init__(self, engine, call):
        self.engine, self.call, self.asked, self.done = engine, call, [], []

    async def generate(self, request, on_tokens=None):
        done = await self.engine.generate(request)
        self.asked.append(request)
        self.done.append(done)
        if len(self.asked) > 1:
            return done
        return replace(done, token_ids=self.call, logprobs=(0.0,) * len(self.call), finish="stop")


@pytest.fixture(scope="module")
def encoder():
    return byte_encoder(tags=("<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>"))


def test_a_two_turn_episode_equals_transformers(encoder, tmp_path):
    transformers = pytest.importorskip("transformers")
    text = qwen3_text(encoder.get_vocab_size())
    model = Qwen3_VL.build(config_of(text, QWEN3_VISION, encoder), 3).eval().requires_grad_(False)
    save_model(model, tmp_path / "model")
    load = transformers.Qwen3VLForConditionalGeneration.from_pretrained
    theirs = load(tmp_path / "model", dtype=torch.float32, attn_implementation="eager").eval()
    noise = np.random.default_rng(5).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    tokenizer = Tokenizer(encoder)
    sampling = SamplingParams(max_new_tokens=10, logit_bias=dict.fromkeys(tokenizer.banned_ids, -float("inf")))

    async def body():
        engine = EmbeddedEngine(model, tokenizer, EngineConfig(kv_bytes=1 << 24, page_size=4))
        insisting = Insisting(engine, (*tokenizer.encode_trusted(CALL), tokenizer.turn_end_id))
        with ImagePipeline(PixelLimits(1024, 1 << 16, 16), "compact", mean=HALF, std=HALF) as pipeline:
            question = Question("q", "noise.png", "What?", tmp_path)
            episode = await run_episode(
                question, insisting, pipeline, tokenizer, load_profile("vtengine"), Limits(), sampling
            )
            await engine.close()
            return episode, insisting

    episode, seen = asyncio.run(body())
    assert episode.status == "truncated", episode.error
    assert [(s.width, s.height, s.visual_tokens) for turn in episode.turns for s in turn.images] == [
        (64, 64, 4),
        (128, 96, 12),
    ]
    first, second = seen.done
    assert second.cached_tokens >= first.prompt_tokens // 4 * 4
    assert second.images_encoded == (False, True)
    for asked, done in zip(seen.asked, seen.done, strict=True):
        assert done.token_ids == greedy(theirs, asked, tokenizer.banned_ids, len(done.token_ids))


@torch.no_grad()
def greedy(theirs, asked: Request, banned, count):
    """transformers' choices, by a whole forward pass for each; its images from rows with both frames."""
    ids, pad = list(asked.token_ids), theirs.config.image_token_id
    rows = torch.cat([i.pixel_values.view(-1, 3, 1, 256).expand(-1, -1, 2, -1).reshape(-1, 1536) for i in asked.images])
    grids = torch.tensor([i.grid_thw for i in asked.images])
    for _ in range(count):
        tokens = torch.tensor([ids])
        kinds = (tokens == pad).int()
        out = theirs(input_ids=tokens, pixel_values=rows, image_grid_thw=grids, mm_token_type_ids=kinds)
        logits = out.logits[0, -1].clone()
        logits[sorted(banned)] = -torch.inf
        ids.append(int(logits.argmax()))
    return tuple(ids[len(asked.token_ids) :])
