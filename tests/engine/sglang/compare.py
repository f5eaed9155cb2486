"""The same episodes on the embedded engine and on a real SGLang: python -m tests.engine.sglang.compare KIND FOLDER

Prints one JSON object. KIND: sglang_http or sglang_engine. FOLDER: a checkpoint, with the images of examples/glance.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from vtengine_training.sync.base import weights_of
from vtengine_training.sync.sglang import ByBroadcast, ByDisk, ByTensor, SglangPublisher

from tests.engine.sglang import probe, real
from vtengine.engine.base import Request, SamplingParams
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.engine.sglang import SglangEngineBackend, SglangHttpBackend
from vtengine.engine.sglang.pixels import PngCache, full_layout
from vtengine.model import hf_tensors, load_model
from vtengine.protocol.conversation import Limits
from vtengine.protocol.profile import load_profile
from vtengine.rollout.episode import run_episode
from vtengine.rollout.question import Question
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.vision.pipeline import ImagePipeline
from vtengine.vision.plan import PixelLimits

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "glance"
WANTED = 3  # episodes with two turns
TRIED = 24
SIBLINGS = 4


class Bench:
    """Tokenizer, images and profile of the checkpoint; greedy episodes over any backend, with a second turn."""

    def __init__(self, folder):
        limits = json.loads((folder / "preprocessor_config.json").read_text())
        self.tokenizer, self.profile = Tokenizer.load(folder), load_profile(folder)
        self.pipeline = ImagePipeline(PixelLimits(limits["min_pixels"], limits["max_pixels"]), "compact")
        self.limits = Limits("adaptive", 2, None)
        # Without the ids that open an answer the model has to call the tool, whatever its policy is.
        answer, plain = (self.tokenizer.encode_untrusted(text) for text in ("</think><answer>", "</think>"))
        opening = set(answer) - set(plain)
        self.bias = dict.fromkeys(opening, -20.0)

    async def episode(self, backend, question, **sampling):
        sampling = SamplingParams(max_new_tokens=64, logit_bias=self.bias, **sampling)
        parts = (self.pipeline, self.tokenizer, self.profile, self.limits, sampling)
        return await run_episode(question, backend, *parts)


def questions():
    rows = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: not row["needs_high"])
    return [Question(row["id"], row["image"], row["question"], EXAMPLES) for row in rows[:TRIED]]


def sampled(episode):
    return [(list(turn.completion.token_ids), list(turn.completion.logprobs)) for turn in episode.turns]


def difference(one, other):
    """Largest difference of logprobs; infinite where other ids were sampled."""
    if [ids for ids, _ in one] != [ids for ids, _ in other]:
        return float("inf")
    pairs = [(a, b) for (_, x), (_, y) in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return max((abs(a - b) for a, b in pairs), default=0.0)


async def main(kind, folder):
    bench, stack = Bench(folder), ExitStack()
    scratch = Path(stack.enter_context(TemporaryDirectory()))
    environment = real.ENVIRONMENT | probe.install(scratch)
    os.environ.update(environment)
    sys.path.insert(0, str(scratch))
    log = probe.Log(environment[probe.LOG])
    model = load_model(folder)
    embedded = EmbeddedEngine(model, bench.tokenizer, EngineConfig(page_size=1))
    ours = []
    for question in questions():
        episode = await bench.episode(embedded, question)
        if len(episode.turns) == 2:
            ours.append((question, episode))
        if len(ours) == WANTED:
            break
    if kind == "sglang_http":
        url = stack.enter_context(real.server(folder))
        backend = SglangHttpBackend(url, folder, deadline_s=120)
    else:
        backend = SglangEngineBackend(folder, updatable=True, arguments=real.ENGINE_ARGUMENTS)
    try:
        report = {"episodes": len(ours)} | await _compare(bench, backend, embedded, ours, log)
        report |= _transformers(bench, folder, report.pop("transcript"))
        report |= await _updates(bench, backend, embedded, model, *ours[0])
        print(json.dumps(report))
    finally:
        await backend.close()
        await embedded.close()
        bench.pipeline.close()
        stack.close()


async def _compare(bench, backend, embedded, ours, log):
    theirs = [await bench.episode(backend, question) for question, _ in ours]
    seen = log.encoded()
    report = {
        "statuses": [[episode.status for episode in group] for group in ([own for _, own in ours], theirs)],
        "logprobs": max(difference(sampled(a), sampled(b)) for (_, a), b in zip(ours, theirs, strict=True)),
        "new_in_turn_2": [_new_in_turn_2(episode) for episode in theirs],
        "encoded": [list(episode.turns[1].completion.images_encoded) for episode in theirs],
        "tower": [seen, [patches for episode in theirs for patches in _patches(episode)]],
        "transcript": theirs[0].transcript,
        "cold": await _cold(bench, backend, theirs[0]),
        "processor": max(_processor_difference(span.image) for span in theirs[0].transcript.images),
    }
    log.encoded()
    siblings = [bench.episode(backend, ours[1][0], temperature=1.0, seed=seed) for seed in range(SIBLINGS)]
    group = await asyncio.gather(*siblings)
    views = sorted({patches for episode in group for patches in _patches(episode)})
    report["siblings"] = [sorted(log.encoded()), views, len(group[0].turns)]
    trick = Question("trick", ours[0][0].image, "Read <|image_pad|> and <|vision_start|>", ours[0][0].root)
    tricked = await bench.episode(backend, trick)
    report["trick"] = [tricked.status, str(tricked.error)]
    return report


async def _updates(bench, backend, embedded, model, question, episode):
    """New vision weights by each way, over an image that SGLang has seen: logprobs against the embedded engine with the
    same, checksums of both sides, versions."""
    report = {"update": [], "moved": [], "checksums": [], "versions": [], "ways": []}
    before = sampled(episode)
    for version, sender in enumerate((ByTensor(), ByBroadcast("gloo"), ByDisk()), start=1):
        weights = {name: t * -1.5 for name, t in hf_tensors(model).items() if name.startswith("visual.merger.mlp.2")}
        await embedded.load_weights(weights, version)
        publisher = SglangPublisher(backend, weights_of(model), sender, 1 << 20, ("kv_cache", "weights"))
        await publisher.release()
        await publisher.publish(version)
        after = sampled(await bench.episode(embedded, question))
        again = await bench.episode(backend, question)
        report["update"].append(difference(after, sampled(again)))
        report["moved"].append(difference(before, after))
        report["versions"].append(again.turns[0].completion.weight_version)
        report["checksums"].append(await _other_checksums(backend, model))
        report["ways"].append(type(sender).__name__)
        before = after
    return report


async def _other_checksums(backend, model):
    """Names of SGLang's parameters that are not, to the bit, those of the model; it has some fused."""
    if backend._transport.takes_tensors:
        (state,) = await backend._transport._manager.get_internal_state()
    else:
        (state,) = (await backend._transport._json("GET", "/server_info"))["internal_states"]
    ours = hf_tensors(model)
    fused = {
        "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attn.qkv_proj": ["attn.qkv"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
        "lm_head": ["model.embed_tokens"],
    }
    other = []
    for name, theirs in state[probe.WEIGHTS].items():
        whole = next((key for key in fused if key in name and name not in ours), None)
        parts = [name.replace(whole, part) for part in fused[whole]] if whole else [name]
        if theirs != probe.checksum(torch.cat([ours[part] for part in parts])):
            other.append(name)
    return other


def _patches(episode):
    return [span.image.pixel_values.shape[0] for span in episode.transcript.images]


@torch.inference_mode()
def _transformers(bench, folder, transcript):
    """Logprobs that SGLang reported, against transformers on the whole transcript without any cache."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([transcript.token_ids])
    pixels = torch.cat([full_layout(span.image.pixel_values, 1176) for span in transcript.images])
    grids = torch.tensor([span.image.grid_thw for span in transcript.images])
    kinds = (tokens == model.config.image_token_id).int()
    logits = model(input_ids=tokens, pixel_values=pixels, image_grid_thw=grids, mm_token_type_ids=kinds).logits[0]
    for token_id, bias in bench.bias.items():
        logits[:, token_id] += bias
    config = model.config
    logits[:, sorted({*bench.tokenizer.banned_ids, config.image_token_id, config.video_token_id})] = -torch.inf
    logprobs = logits.log_softmax(-1)
    wanted = [place for place, sampled in enumerate(transcript.trainable) if sampled]
    theirs = [float(logprobs[place - 1, transcript.token_ids[place]]) for place in wanted]
    return {"transformers": max(abs(a - transcript.logprobs[p]) for a, p in zip(theirs, wanted, strict=True))}


def _new_in_turn_2(episode):
    """(tokens prefilled in turn 2, tokens that are new in it)"""
    first, second = (turn.completion for turn in episode.turns)
    return [second.prefill_tokens, second.prompt_tokens - first.prompt_tokens - len(first.token_ids)]


async def _cold(bench, backend, episode):
    """Turn 2 after the cache was emptied, against the resumed one; and how much of it was cached."""
    transcript, warm = episode.transcript, episode.turns[1].completion
    await backend._updates.flush()
    request = transcript.request("cold", 1, SamplingParams(max_new_tokens=len(warm.token_ids), logit_bias=bench.bias))
    ids = tuple(transcript.token_ids[: warm.prompt_tokens])
    cold = await backend.generate(Request("cold", ids, request.images, request.sampling))
    pair = ([(list(c.token_ids), list(c.logprobs))] for c in (cold, warm))
    return [difference(*pair), cold.cached_tokens, list(cold.images_encoded)]


def _processor_difference(image):
    """What SGLang's image processor makes of our PNG, against our pixel values."""
    from transformers import Qwen2VLImageProcessor

    url = PngCache(1 << 20).data_url(image, "pixels")
    png = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    theirs = Qwen2VLImageProcessor(min_pixels=784, max_pixels=1 << 24)(images=[png], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [list(image.grid_thw)]
    return float((theirs["pixel_values"] - full_layout(image.pixel_values, 1176).to(torch.float32)).abs().max())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
