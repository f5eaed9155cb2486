"""A tiny random model, a byte-like tokenizer and requests for the engine's tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from tests.tiny_model import TINY_VISION, config_of, tiny_text
from vtengine.engine.base import ImageInput, Request, SamplingParams
from vtengine.model import PackedCausal, Qwen2_5_VL, mrope_positions

PAD, VIDEO, STOP = 250, 251, 252
VOCAB = 256
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Letters:
    """Ids below 128 are characters, 250 and more are special."""

    def encode_trusted(self, text):
        return [PAD] if text == "<|image_pad|>" else [ord(c) for c in text]

    def decode(self, token_ids):
        return "".join(chr(32 + t % 90) for t in token_ids if t < PAD)


def tiny_config():
    return replace(
        config_of(tiny_text(), TINY_VISION),
        text=tiny_text(VOCAB),
        image_token_id=PAD,
        video_token_id=VIDEO,
        vision_start_token_id=253,
        vision_end_token_id=254,
        eos_token_id=STOP,
        bos_token_id=None,
    )


def tiny_model(seed=0):
    return Qwen2_5_VL.build(tiny_config(), seed).eval()


def image(seed, h=4, w=6, width=588):
    """Random bytes, normalised as the processors do (so that they can also travel as a PNG)."""
    pixels = torch.randint(256, (h * w, 3, 1, 196), generator=torch.Generator().manual_seed(seed)) / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    pixels = ((pixels - mean) / std).expand(-1, -1, 2 if width > 588 else 1, -1).reshape(h * w, -1)
    return ImageInput(f"image-{seed}", (1, h, w), pixels[:, :width].contiguous())


def prompt(seed, length, images=()):
    """Random text of `length` ids with the images' placeholders spread in it."""
    ids = np.random.default_rng(seed).integers(0, PAD, length).tolist()
    for k, picture in enumerate(images):
        at = (k + 1) * length // (len(images) + 1) + sum(i.visual_tokens + 2 for i in images[:k])
        ids[at:at] = [253, *[PAD] * picture.visual_tokens, 254]
    return tuple(ids)


def request(name, ids, images=(), began_s=None, **sampling):
    sampling.setdefault("max_new_tokens", 12)
    return Request(name, tuple(ids), tuple(images), SamplingParams(**sampling), began_s)


@torch.inference_mode()
def cold_logits(model, ids, images=()):
    """[T, vocab] of a plain forward pass without any cache."""
    token_ids = torch.tensor(ids, device=model.device)
    grids = [i.grid_thw for i in images]
    pixels = [i.pixel_values.to(model.device, model.dtype) for i in images]
    features = torch.cat([model.visual(x, [grid]) for x, grid in zip(pixels, grids, strict=True)]) if images else None
    positions, _ = mrope_positions(ids, grids, image_token_id=PAD)
    hidden = model.decode(model.embed(token_ids, features), positions.to(model.device), PackedCausal([0, len(ids)]))
    return model.logits(hidden)


def cold_greedy(model, ids, images=(), count=12, stops=()):
    """(ids, logprobs) of greedy decoding with the whole sequence computed anew for every token."""
    ids, new, logprobs = list(ids), [], []
    for _ in range(count):
        logits = cold_logits(model, ids, images)[-1].clone()
        logits[[PAD, VIDEO]] = -torch.inf
        token = int(logits.argmax())
        new.append(token)
        logprobs.append(float(logits.log_softmax(-1)[token]))
        ids.append(token)
        if token in stops:
            break
    return tuple(new), tuple(logprobs)
