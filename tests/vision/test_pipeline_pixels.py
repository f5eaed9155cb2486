"""How the pipeline makes pixels: whose arithmetic, how the low view comes about, and on which device."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from vtengine_kernels.patchify import Target, patchify  # noqa: E402

from vtengine.vision import pipeline as pipeline_module  # noqa: E402
from vtengine.vision.image_input import ImageInput  # noqa: E402
from vtengine.vision.pipeline import ImagePipeline  # noqa: E402
from vtengine.vision.plan import PixelLimits  # noqa: E402

BOX = (10, 30, 60, 100)


@pytest.fixture
def root(tmp_path: Path, noise: Image.Image) -> Path:
    noise.resize((150, 410)).save(tmp_path / "noise.png")
    return tmp_path


def views(root: Path, **options: Any) -> list[ImageInput]:
    """Low view, high view and a crop of noise.png."""

    async def whole() -> list[ImageInput]:
        image = await pipe.open("noise.png", root)
        return await pipe.views(image, [image.low, image.high, image.crop(BOX)])

    with ImagePipeline(PixelLimits(784, 1 << 20), num_workers=1, **options) as pipe:
        return asyncio.run(whole())


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="the order of Pillow's passes is the new one")
@pytest.mark.parametrize("layout", ["full", "compact"])
def test_the_low_view_of_the_released_weights_is_resized_twice(root: Path, layout: str) -> None:
    low, high, _ = views(root, low_view="half_first", layout=layout)
    plain, same, _ = views(root, layout=layout)
    with Image.open(root / "noise.png") as source:
        half = source.resize((source.width // 2, source.height // 2), Image.Resampling.LANCZOS)
    twice = np.asarray(half.resize((low.width, low.height), Image.Resampling.BICUBIC))
    expected = patchify(twice, [Target(low.height, low.width)], layout=layout)[0]  # the size stays
    assert torch.equal(low.pixel_values, expected)
    assert low.content_hash != plain.content_hash and high.content_hash == same.content_hash


def test_torchvisions_arithmetic(root: Path) -> None:
    with Image.open(root / "noise.png") as source:
        pixels = np.asarray(source.convert("RGB"))
    low, high, _ = views(root, resize_mode="tv")
    plain = views(root)
    for view in (low, high):
        assert torch.equal(view.pixel_values, patchify(pixels, [Target(view.height, view.width)], mode="tv")[0])
    assert low.content_hash != plain[0].content_hash


def test_views_are_made_on_the_device_of_the_pipeline(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = pipeline_module.patchify, []

    def on_the_cpu(*arguments: Any, device: torch.device, **options: Any) -> list[torch.Tensor]:
        asked.append(device)
        return made(*arguments, **options)

    monkeypatch.setattr(pipeline_module, "patchify", on_the_cpu)
    views(root, device="cuda:0")
    views(root)
    assert asked == [torch.device("cuda:0"), torch.device("cpu")]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"layout": "compact", "dtype": torch.bfloat16}, {"low_view": "half_first"}], ids=str
)
def test_views_made_on_a_gpu_equal_those_of_the_cpu(root: Path, options: dict[str, Any]) -> None:
    for got, want in zip(views(root, device="cuda", **options), views(root, **options), strict=True):
        assert got == want and got.pixel_values.is_cuda
        assert torch.equal(got.pixel_values.cpu(), want.pixel_values)
