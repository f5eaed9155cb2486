"""Images that come over a network, beside all others."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("torch")

from vtengine.vision import pipeline as pipeline_module
from vtengine.vision.errors import ImageError
from vtengine.vision.fetches import MOST, PER_HOST
from vtengine.vision.pipeline import ImagePipeline
from vtengine.vision.source import fetched_from


@pytest.fixture
def root(tmp_path: Path, photo: Image.Image, noise: Image.Image) -> Path:
    photo.resize((300, 200)).save(tmp_path / "photo.png")
    noise.resize((150, 410)).save(tmp_path / "data.png")
    return tmp_path


def test_a_host_that_does_not_answer_holds_up_nobody_else(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither other images, files as those of other hosts, nor the end of the pipeline."""
    gate, asked, counting = threading.Event(), Counter[str](), threading.Lock()
    real = pipeline_module.read_image_source

    def read(source: str, *rest: Any) -> bytes:
        if source.startswith("http://silent"):
            with counting:
                asked["now"] += 1
                asked["most"] = max(asked["most"], asked["now"])
            assert gate.wait(60)
            with counting:
                asked["now"] -= 1
            raise ImageError("image_unreachable", "timed out")
        return real("photo.png" if source.startswith("http") else source, *rest)

    monkeypatch.setattr(pipeline_module, "read_image_source", read)
    url = "data:image/png;base64," + base64.b64encode((root / "data.png").read_bytes()).decode()

    async def opened(pipe: ImagePipeline) -> list[asyncio.Task[Any]]:
        silent = [asyncio.create_task(pipe.open(f"http://silent/{k}.png", root)) for k in range(MOST + 1)]
        async with asyncio.timeout(30):
            for source in ("photo.png", url, "https://other/a.png"):
                image = await pipe.open(source, root)
                await pipe.view(image, image.low)
            while asked["now"] < PER_HOST:
                await asyncio.sleep(0.01)
        return silent

    async def main() -> None:
        silent = await opened(pipe)
        gate.set()
        faults = await asyncio.gather(*silent, return_exceptions=True)
        assert {getattr(fault, "code", fault) for fault in faults} == {"image_unreachable"}
        assert asked["most"] == PER_HOST
        gate.clear()
        for task in await opened(pipe):
            task.cancel()

    with ImagePipeline(num_workers=2) as pipe:
        try:
            asyncio.run(main())
            pipe.close()  # while the host is silent
            assert not gate.is_set() and asked["now"] == PER_HOST
        finally:
            gate.set()


@pytest.mark.parametrize(
    ("source", "host"),
    [
        ("http://Host.example:80/a.png?b=http://x/", "host.example:80"),
        ("https://user:word@host#a", "host"),
        ("HTTP://[::1]:8000", "[::1]:8000"),
        ("file://host/a.png", None),
        ("a.png", None),
        ("data:image/png;base64,http://x/", None),
    ],
)
def test_which_host_an_image_is_fetched_from(source: str, host: str | None) -> None:
    assert fetched_from(source) == host
