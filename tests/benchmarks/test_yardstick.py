"""The transformers yardstick answers the same requests with the same ids as the engine, padded or not."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_model import END, PAD, START, STOP, TINY_VISION, config_of, tiny_text
from vtengine.engine.base import Completion, ImageInput, Request, RequestRejected, SamplingParams
from vtengine.model import Qwen2_5_VL, save_model

pytest.importorskip("transformers", reason="transformers is not installed")

CONFIG = config_of(tiny_text(), TINY_VISION)


class NoText:
    """A decoder for requests without stop strings."""

    def decode(self, token_ids: object) -> str:
        return ""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = Qwen2_5_VL.build(CONFIG, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # a fresh model prefers no token; this one has clear favourites
    save_model(model, folder)
    return folder


def make_requests() -> list[Request]:
    """One, two and three images, of different sizes."""
    requests = []
    for count in (1, 2, 3):
        ids: list[int] = []
        images = []
        for index in range(count):
            grid = (1, 4 + 2 * index, 6)
            generator = torch.Generator().manual_seed(10 * count + index)
            pixels = torch.randn(grid[1] * grid[2], 588, generator=generator)
            images.append(ImageInput(f"{count}-{index}", grid, pixels))
            ids += [7 + index, START, *[PAD] * images[-1].visual_tokens, END, *range(20, 25 + 3 * index)]
        bans = {token: float("-inf") for token in range(310, 315)}
        sampling = SamplingParams(max_new_tokens=9, stop_token_ids=(STOP,), logit_bias=bans)
        requests.append(Request(str(count), tuple(ids), tuple(images), sampling))
    return requests


@pytest.mark.parametrize(("batch", "num_calls"), [(1, 3), (8, 1)])
def test_same_ids_as_the_engine(repo_root: Path, checkpoint: Path, batch: int, num_calls: int) -> None:
    sys.path.insert(0, str(repo_root / "benchmarks"))
    from transformers_backend import TransformersBackend

    from vtengine.engine.embedded import EmbeddedEngine
    from vtengine.model import load_model

    async def go() -> tuple[list[Completion], list[Completion]]:
        engine, yardstick = EmbeddedEngine(load_model(checkpoint), NoText()), TransformersBackend(checkpoint, batch)
        ours = await asyncio.gather(*(engine.generate(request) for request in make_requests()))
        theirs = await asyncio.gather(*(yardstick.generate(request) for request in make_requests()))
        assert yardstick.num_calls == num_calls
        hot = dataclasses.replace(make_requests()[0], sampling=SamplingParams(temperature=1.0))
        with pytest.raises(RequestRejected, match="greedy"):
            await yardstick.generate(hot)
        await engine.close()
        await yardstick.close()
        return ours, theirs

    ours, theirs = asyncio.run(go())
    assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]
    assert [one.finish for one in ours] == [one.finish for one in theirs]
    assert all(one.cached_tokens == 0 for one in theirs)
