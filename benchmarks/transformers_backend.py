"""`transformers` `generate` behind our Backend seam: the yardstick of the two-turn suites.

It is given what the engine is given (the same ids and pixels, from the same episode loop) and used as its users do:
each turn is one `generate` call over the whole context with its own key-value cache; with `batch` > 1 waiting requests
are padded on the left into one call (static batching: the call ends with its longest reply).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vtengine.engine.base import Completion, OnTokens, Request, RequestRejected

LINGER_S = 0.003
"""How long a call waits for more requests once the queue is empty."""


@dataclass
class _Waiting:
    request: Request
    future: asyncio.Future[Completion]
    since_s: float = field(default_factory=time.perf_counter)


class TransformersBackend:
    """Greedy only. `batch`: most requests in one call."""

    def __init__(self, folder: Path, batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.model.generation_config.pad_token_id = None
        self.batch, self.device = batch, device
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None
        self.num_calls = 0

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        if request.sampling.temperature != 0:
            raise RequestRejected("sampling_unsupported", "the transformers yardstick is greedy only", "setup")
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        completion = await waiting.future
        if on_tokens is not None:
            on_tokens(completion.token_ids)
        return completion

    async def load_weights(self, source: Path | Mapping[str, torch.Tensor], version: int) -> None:
        raise NotImplementedError("the yardstick keeps its weights")

    def stats(self) -> dict[str, float]:
        return {"calls": float(self.num_calls)}

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            group = [await self._queue.get()]
            while len(group) < self.batch:
                try:
                    group.append(await asyncio.wait_for(self._queue.get(), LINGER_S))
                except TimeoutError:
                    break
            try:
                replies = await asyncio.to_thread(self._generate, [one.request for one in group])
            except Exception as error:
                for one in group:
                    one.future.set_exception(error)
                continue
            for one, token_ids in zip(group, replies, strict=True):
                if not one.future.cancelled():
                    one.future.set_result(_completion(one, token_ids))

    @torch.inference_mode()
    def _generate(self, requests: list[Request]) -> list[tuple[int, ...]]:
        """Sampled ids of each request, cut after its stop id."""
        self.num_calls += 1
        longest = max(len(request.token_ids) for request in requests)
        stop_ids = sorted({stop for request in requests for stop in request.sampling.stop_token_ids})
        output = self.model.generate(
            **self._inputs(requests, longest),
            max_new_tokens=max(request.sampling.max_new_tokens for request in requests),
            do_sample=False,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
            suppress_tokens=sorted(_banned(requests[0])) or None,
        )
        return [_cut(row, request) for row, request in zip(output[:, longest:].tolist(), requests, strict=True)]

    def _inputs(self, requests: list[Request], longest: int) -> dict[str, Any]:
        ids = torch.zeros(len(requests), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            start = longest - len(request.token_ids)
            ids[row, start:] = torch.tensor(request.token_ids)
            mask[row, start:] = 1
        images = [image for request in requests for image in request.images]
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs["mm_token_type_ids"] = ((ids == self.model.config.image_token_id) & mask.bool()).int()
        if images:
            inputs["pixel_values"] = torch.cat([full_rows(image.pixel_values) for image in images]).float()
            inputs["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
        return {name: value.to(self.device) for name, value in inputs.items()}


def full_rows(pixel_values: torch.Tensor) -> torch.Tensor:
    """[P, 588] or [P, 1176] -> [P, 1176]: the compact layout leaves out the second of two equal frames."""
    if pixel_values.shape[1] == 1176:
        return pixel_values
    frames = pixel_values.view(-1, 3, 1, 14 * 14).expand(-1, 3, 2, 14 * 14)
    return frames.reshape(-1, 1176)


def _banned(request: Request) -> list[int]:
    return [token for token, bias in request.sampling.logit_bias.items() if bias == float("-inf")]


def _cut(row: list[int], request: Request) -> tuple[int, ...]:
    sampling = request.sampling
    for index, token in enumerate(row[: sampling.max_new_tokens]):
        if token in sampling.stop_token_ids:
            return tuple(row[: index + 1])
    return tuple(row[: sampling.max_new_tokens])


def _completion(waiting: _Waiting, token_ids: tuple[int, ...]) -> Completion:
    """The account of a backend without any cache; its first token is known when the call ends."""
    request = waiting.request
    latency_s = time.perf_counter() - waiting.since_s
    stopped = bool(token_ids) and token_ids[-1] in request.sampling.stop_token_ids
    return Completion(
        request_id=request.request_id,
        token_ids=token_ids,
        logprobs=(0.0,) * len(token_ids),
        finish="stop" if stopped else "length",
        prompt_tokens=len(request.token_ids),
        cached_tokens=0,
        images_encoded=(True,) * len(request.images),
        weight_version=0,
        ttft_s=latency_s,
        latency_s=latency_s,
    )
