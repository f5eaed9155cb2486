"""What is checked before a request enters the engine, so that nothing in it can fail later."""

from __future__ import annotations

import math
import secrets
import time
from typing import TYPE_CHECKING

from vtengine.engine.base import RequestRejected
from vtengine.engine.embedded.sequence import Sequence, image_spans, prompt_keys
from vtengine.model import mrope_positions

if TYPE_CHECKING:
    from vtengine.engine.base import ImageInput, Request
    from vtengine.engine.embedded.pages import PagePool
    from vtengine.model import ModelConfig

MAX_LOGIT_BIAS = 1e4
"""Far beyond any logit, and far within float16."""


def prepare(request: Request, model: ModelConfig, pool: PagePool) -> Sequence:
    """A sequence ready to be submitted. Raises RequestRejected with the field, the figures and what to do.

    The messages go into records: they hold no request id, which depends on what else was served.
    """
    _check_tokens(request, model.text.vocab_size)
    _check_sampling(request, model.text.vocab_size)
    _check_images(request, model)
    _check_size(request, pool)
    grids = [image.grid_thw for image in request.images]
    try:
        positions, following = mrope_positions(request.token_ids, grids, image_token_id=model.image_token_id)
    except ValueError as error:
        raise RequestRejected("image_tokens_mismatch", str(error), "setup") from error
    seed = request.sampling.seed
    return Sequence(
        request=request,
        keys=prompt_keys(request, model.image_token_id),
        spans=image_spans(request.token_ids, request.images, model.image_token_id),
        positions=positions.numpy(),
        delta=following - len(request.token_ids),
        seed=secrets.randbits(64) if seed is None else seed,
        submitted_s=time.perf_counter(),
    )


def _check_tokens(request: Request, vocab_size: int) -> None:
    if not request.token_ids:
        raise RequestRejected("empty_prompt", "token_ids is empty; give at least one token", "setup")
    low, high = min(request.token_ids), max(request.token_ids)
    if low < 0 or high >= vocab_size:
        message = f"token_ids has {low if low < 0 else high}: ids of this model are 0..{vocab_size - 1}"
        raise RequestRejected("token_out_of_range", message, "setup")


def _check_sampling(request: Request, vocab_size: int) -> None:
    sampling = request.sampling
    if any(not stop for stop in sampling.stop):
        raise RequestRejected("invalid_sampling", "sampling.stop has an empty string; leave it out", "setup")
    for token_id, value in sampling.logit_bias.items():
        if not 0 <= token_id < vocab_size or not (value == -math.inf or abs(value) <= MAX_LOGIT_BIAS):
            message = (
                f"sampling.logit_bias[{token_id}] = {value}: ids are 0..{vocab_size - 1}, values are -inf or within "
                f"{MAX_LOGIT_BIAS:g} of 0"
            )
            raise RequestRejected("invalid_sampling", message, "setup")
    if sum(value == -math.inf for value in sampling.logit_bias.values()) >= vocab_size:
        raise RequestRejected("invalid_sampling", "sampling.logit_bias bans every id; leave at least one", "setup")


def _check_images(request: Request, model: ModelConfig) -> None:
    wanted = sum(image.visual_tokens for image in request.images)
    found = request.token_ids.count(model.image_token_id)
    if wanted != found:
        message = f"{found} ids {model.image_token_id} (image), but the images have {wanted} visual tokens"
        raise RequestRejected("image_tokens_mismatch", message, "setup")
    for index, image in enumerate(request.images):
        _check_pixels(index, image, (model.vision.patch_dim, model.vision.compact_dim))


def _check_pixels(index: int, image: ImageInput, widths: tuple[int, ...]) -> None:
    t, h, w = image.grid_thw
    shape = tuple(image.pixel_values.shape)
    if len(shape) != 2 or shape[0] != t * h * w or shape[1] not in widths:
        message = f"images[{index}].pixel_values is {list(shape)}: grid {image.grid_thw} needs [{t * h * w}, {widths}]"
        raise RequestRejected("image_shape", message, "setup")


def _check_size(request: Request, pool: PagePool) -> None:
    prompt, new = len(request.token_ids), request.sampling.max_new_tokens
    needed = pool.pages_for(prompt + new - 1)
    if needed > pool.num_pages:
        message = (
            f"{prompt} prompt tokens + max_new_tokens {new} need {needed} pages of {pool.page_size} tokens, the pool "
            f"has {pool.num_pages}; shorten the request or enlarge the pool (--kv-gb, engine.kv_bytes)"
        )
        raise RequestRejected("request_too_large", message)
