"""Requests made up for an engine: pictures of noise, prompts of which no two share a page, replies of fixed length."""

from __future__ import annotations

import torch

from vtengine.engine.base import ImageInput, Request, SamplingParams
from vtengine.rollout.tokenizer import Tokenizer

TEXT_TOKENS = 24


class MadeUp:
    """Special ids are never sampled, so that a reply ends at its length alone."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.num_images = tokenizer, 0
        self._bans = {token: float("-inf") for token in tokenizer.special_ids}

    def image(self, side: int) -> ImageInput:
        """A square of noise, never seen before."""
        self.num_images += 1
        grid = (1, side // 14, side // 14)
        generator = torch.Generator().manual_seed(self.num_images)
        pixels = torch.randn(grid[1] * grid[2], 588, generator=generator)
        return ImageInput(f"noise-{self.num_images}", grid, pixels)

    def ask(self, image: ImageInput) -> list[int]:
        """A prompt of one image and TEXT_TOKENS other tokens, of which no two prompts share a page."""
        start, end = (self.tokenizer.special_id(name) for name in ("<|vision_start|>", "<|vision_end|>"))
        assert start is not None and end is not None
        text = [(7 * self.num_images + 3 * index) % 200 for index in range(TEXT_TOKENS)]
        return [*text[:8], start, *[self.tokenizer.image_pad_id] * image.visual_tokens, end, *text[8:]]

    def request(self, name: str, ids: list[int], images: list[ImageInput], new_tokens: int) -> Request:
        sampling = SamplingParams(max_new_tokens=new_tokens, logit_bias=self._bans)
        return Request(name, tuple(ids), tuple(images), sampling)
