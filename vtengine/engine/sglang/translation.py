"""One translation of a `Request` for SGLang, in-process and over HTTP, and what is checked before it is sent.

SGLang 0.5.17 answers an id outside of the vocabulary by dying, and placeholders that do not fit by re-tokenising; so
everything that could go wrong there is refused here.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from vtengine.engine.base import RequestRejected
from vtengine.engine.sglang.pixels import full_layout

if TYPE_CHECKING:
    from vtengine.engine.base import ImageInput, Request, SamplingParams
    from vtengine.engine.sglang.served import ServedModel
    from vtengine.protocol.messages import Blame

BAN = -1e9  # JSON has no infinity; after softmax in float32 this is a probability of exactly 0
SEED_BITS = 0x7FFFFFFF
ALL_IDS = 1 << 30  # SGLang's own number for a top_k that is off; it keeps 32 bits
ONCE = 1 << 30  # stream_interval: the first token, then only the end

Span = tuple[int, int]
Encode = Callable[["ImageInput", str], str]


def check(request: Request, model: ServedModel) -> list[Span]:
    """Spans [start, end) of the placeholders of every image. Raises RequestRejected with field, figures and remedy."""
    if not request.token_ids:
        raise _rejected(request, "empty_prompt", "token_ids is empty; give at least one token")
    low, high = min(request.token_ids), max(request.token_ids)
    if low < 0 or high >= model.vocab_size:
        message = f"token_ids has {low if low < 0 else high}: ids of this model are 0..{model.vocab_size - 1}"
        raise _rejected(request, "token_out_of_range", message)
    _check_sampling(request, model.vocab_size)
    spans = _spans(request, model.image_token_id)
    for index, image in enumerate(request.images):
        t, h, w = image.grid_thw
        shape, widths = tuple(image.pixel_values.shape), (model.patch_dim, model.compact_dim)
        if t != 1 or h % 2 or w % 2 or len(shape) != 2 or shape[0] != t * h * w or shape[1] not in widths:
            message = f"images[{index}].pixel_values is {list(shape)}: grid {image.grid_thw} needs [{h * w}, {widths}]"
            raise _rejected(request, "image_shape", message)
    return spans


def with_tensors(request: Request, model: ServedModel, spans: list[Span]) -> dict[str, Any]:
    """input_ids as they are, and all images as one item of processor output: SGLang's image processor never runs."""
    payload: dict[str, Any] = {"input_ids": list(request.token_ids)}
    if request.images:
        pixels = [full_layout(image.pixel_values, model.patch_dim) for image in request.images]
        item = {
            "format": "processor_output",
            "pixel_values": torch.cat(pixels) if len(pixels) > 1 else pixels[0],
            "image_grid_thw": torch.tensor([image.grid_thw for image in request.images], dtype=torch.int64),
            "offsets": [(start, end - 1) for start, end in spans],
        }
        payload["image_data"] = [item]
    return payload


def with_png(request: Request, model: ServedModel, spans: list[Span], encode: Encode) -> dict[str, Any]:
    """input_ids with one placeholder per image, which SGLang expands, and the images as lossless PNG."""
    ids: list[int] = []
    begin = 0
    for start, end in spans:
        ids += request.token_ids[begin : start + 1]
        begin = end
    ids += request.token_ids[begin:]
    payload: dict[str, Any] = {"input_ids": ids}
    if request.images and model.decode is not None:
        _check_text(request, model.decode(ids))
    for index, image in enumerate(request.images):
        pixels = image.height * image.width
        if not model.min_pixels <= pixels <= model.max_pixels:
            message = (
                f"images[{index}] has {image.width} x {image.height} = {pixels} pixels; the server's image processor "
                f"resizes what is outside of {model.min_pixels}..{model.max_pixels}. Widen min_pixels and max_pixels "
                "in preprocessor_config.json on both sides, or use --backend sglang (in-process)"
            )
            raise _rejected(request, "image_outside_server_limits", message)
    if request.images:
        payload["image_data"] = [encode(image, request.request_id) for image in request.images]
    return payload


def options(request: Request, model: ServedModel, streamed: bool) -> dict[str, Any]:
    """Everything of the payload that is not the prompt."""
    return {
        "sampling_params": sampling_params(request.sampling, model, streamed),
        "return_logprob": True,  # of output tokens; a logprob_start_len would switch prefix reuse off
        "return_prompt_token_ids": not streamed,  # comes with every chunk: affordable where there are two
        "stream": True,
    }


def sampling_params(sampling: SamplingParams, model: ServedModel, streamed: bool) -> dict[str, Any]:
    """SGLang's names. Image and video ids are banned; a missing seed is drawn (SGLang would take 42 for all)."""
    bias = {str(token_id): max(value, BAN) for token_id, value in sampling.logit_bias.items()}
    bias |= {str(model.image_token_id): BAN, str(model.video_token_id): BAN}
    seed = secrets.randbits(31) if sampling.seed is None else sampling.seed & SEED_BITS
    params: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": min(sampling.top_k, ALL_IDS) or -1,
        "min_p": sampling.min_p,
        "stop_token_ids": list(sampling.stop_token_ids),
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logit_bias": bias,
        "sampling_seed": seed,
        "stream_interval": 1 if streamed else ONCE,
    }
    if sampling.stop:
        params["stop"] = list(sampling.stop)
    return params


def _check_text(request: Request, text: str) -> None:
    """SGLang looks for images in the decoded text; one placeholder too many, and 0.5.17 never answers."""
    spelled = text.count("<|image_pad|>") - len(request.images) + text.count("<|video_pad|>")
    if spelled:
        message = (
            "its text spells <|image_pad|> or <|video_pad|>, which SGLang over HTTP takes for an image; leave that "
            "out, or use --backend sglang (in-process)"
        )
        raise _rejected(request, "text_spells_marker", message, "request")


def _check_sampling(request: Request, vocab_size: int) -> None:
    sampling = request.sampling
    if any(not stop for stop in sampling.stop):
        raise _rejected(request, "invalid_sampling", "sampling.stop has an empty string; leave it out")
    for token_id, value in sampling.logit_bias.items():
        if not 0 <= token_id < vocab_size or math.isnan(value) or value == math.inf:
            message = f"sampling.logit_bias[{token_id}] = {value}: ids are 0..{vocab_size - 1}, values finite or -inf"
            raise _rejected(request, "invalid_sampling", message)


def _spans(request: Request, image_token_id: int) -> list[Span]:
    runs: list[Span] = []
    for is_image, run in groupby(enumerate(request.token_ids), key=lambda pair: pair[1] == image_token_id):
        if is_image:
            places = [place for place, _ in run]
            runs.append((places[0], places[-1] + 1))
    wanted = [image.visual_tokens for image in request.images]
    found = [end - start for start, end in runs]
    if wanted != found:
        message = (
            f"runs of image id {image_token_id} are {found} long, the images have {wanted} visual tokens; "
            "every image needs a run of its own"
        )
        raise _rejected(request, "image_tokens_mismatch", message)
    return runs


def _rejected(request: Request, code: str, message: str, blame: Blame = "setup") -> RequestRejected:
    """Ids, sampling and pixels are made by this program; a question brings its text alone."""
    return RequestRejected(code, f"request {request.request_id}: {message}", blame)
