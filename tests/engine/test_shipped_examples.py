"""Resumption on every shipped example: what turn 2 prefills and encodes, and its logprobs against a cold pass."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vtengine.engine.base import SamplingParams
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.model import PackedCausal, load_model
from vtengine.protocol.conversation import Limits
from vtengine.protocol.profile import load_profile
from vtengine.protocol.reply import parse_reply
from vtengine.protocol.tools import RESIZE_CALL
from vtengine.rollout.group import Setting, run_batch
from vtengine.rollout.question import Question
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.vision.pipeline import ImagePipeline
from vtengine.vision.plan import PixelLimits

REPO = Path(__file__).resolve().parents[2]
MODEL = REPO / "vtengine/assets/glance"
FILES = [REPO / "examples/glance/questions.jsonl", REPO / "examples/photos/questions.jsonl"]
PAGE = 16
TOLERANCE = 1e-4


class AlwaysAsks:
    """The engine, but a first reply that asks for no view is replaced by one that does (`replaced`: how many)."""

    def __init__(self, engine, tokenizer, profile):
        self.engine, self.tokenizer = engine, tokenizer
        self.ids = (*tokenizer.encode_trusted(profile.reply_call("Look.", RESIZE_CALL)), tokenizer.turn_end_id)
        self.replaced = set()

    async def generate(self, request, on_tokens=None):
        done = await self.engine.generate(request)
        if len(request.images) > 1 or parse_reply(self.tokenizer.decode(done.token_ids[:-1])).call is not None:
            return done
        self.replaced.add(request.images[0].content_hash)
        return replace(done, token_ids=self.ids, logprobs=(0.0,) * len(self.ids), finish="stop")


def questions():
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            yield Question(f"{path.parent.name}-{number}", row["image"], row["question"], path.parent)


@torch.inference_mode()
def cold_logprobs(model, transcript, banned):
    """Of every token given the ones before it: one pass over the whole transcript, no cache [T - 1]."""
    images = [span.image for span in transcript.images]
    pixels = torch.cat([image.pixel_values for image in images])
    features = model.visual(pixels, [image.grid_thw for image in images])
    ids = torch.tensor(transcript.token_ids)
    hidden = model.decode(model.embed(ids, features), transcript.positions(), PackedCausal(torch.tensor([0, len(ids)])))
    logits = model.logits(hidden[:-1]).float()
    logits[:, sorted(banned)] = -torch.inf
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def check(sample, model, tokenizer, was_replaced):
    episode, transcript = sample.episode, sample.episode.transcript
    assert len(episode.turns) == 2, (sample.question.id, episode.status, episode.error)
    first, second = (turn.completion for turn in episode.turns)
    known = first.prompt_tokens + (0 if was_replaced else len(first.token_ids))
    assert second.prefill_tokens < second.prompt_tokens - known + PAGE
    assert second.images_encoded == (False, True)
    cold = cold_logprobs(model, transcript, tokenizer.banned_ids)
    spans = transcript.sampled[1:] if was_replaced else transcript.sampled
    for span in spans:
        warm = torch.tensor(transcript.logprobs[span.start : span.end])
        assert (warm - cold[span.start - 1 : span.end - 1]).abs().max() < TOLERANCE, sample.question.id


@pytest.mark.skipif(not (MODEL / "model.safetensors").is_file(), reason="the shipped model is not in this tree")
def test_every_shipped_example_resumes_exactly():
    model, tokenizer, profile = load_model(MODEL), Tokenizer.load(MODEL), load_profile(MODEL)
    stated = json.loads((MODEL / "preprocessor_config.json").read_text(encoding="utf-8"))

    async def run():
        engine = EmbeddedEngine(model, tokenizer, EngineConfig(page_size=PAGE, kv_bytes=1 << 28))
        backend = AlwaysAsks(engine, tokenizer, profile)
        with ImagePipeline(PixelLimits(stated["min_pixels"], stated["max_pixels"]), "compact") as pipeline:
            limits, sampling = Limits("adaptive", 2), SamplingParams(max_new_tokens=64)
            setting = Setting(backend, pipeline, tokenizer, profile, limits, sampling)
            try:
                return [sample async for sample in run_batch(setting, questions(), concurrency=16)], backend.replaced
            finally:
                await engine.close()

    samples, replaced = asyncio.run(run())
    assert len(samples) >= 64
    for sample in samples:
        check(sample, model, tokenizer, sample.episode.transcript.images[0].image.content_hash in replaced)
