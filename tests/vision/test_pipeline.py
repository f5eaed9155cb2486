"""The pipeline: right pixels, each piece of work once, failures and cancellation without damage."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import threading
from collections.abc import Awaitable, Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from vtengine.vision import pipeline as pipeline_module  # noqa: E402
from vtengine.vision.errors import ImageError  # noqa: E402
from vtengine.vision.image_input import ImageInput  # noqa: E402
from vtengine.vision.pipeline import ImagePipeline  # noqa: E402
from vtengine.vision.plan import PixelLimits, plan_scale  # noqa: E402

T = TypeVar("T")
LIMITS = PixelLimits(784, 1 << 20)
# Pillow 13 changed the order of its two passes, which moves single levels
PILLOW = "pil13" if int(PIL.__version__.partition(".")[0]) >= 13 else "pil12"


def run(main: Callable[[ImagePipeline], Awaitable[T]], **options: Any) -> tuple[T, dict[str, float]]:
    """The result of `main` and the counters afterwards."""

    async def whole() -> T:
        return await main(pipe)

    with ImagePipeline(**{"limits": LIMITS, "num_workers": 4, "resize_mode": PILLOW, **options}) as pipe:
        result = asyncio.run(whole())
        return result, pipe.stats()


@pytest.fixture
def root(tmp_path: Path, photo: Image.Image, noise: Image.Image) -> Path:
    photo.resize((300, 200)).save(tmp_path / "photo.png")
    photo.resize((300, 200)).save(tmp_path / "photo.bmp")
    noise.resize((150, 410)).save(tmp_path / "noise.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "photo.png").read_bytes())
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def assert_like_processor(view: ImageInput, source: Image.Image, layout: str = "full", resample: int = 3) -> None:
    """The view is what the transformers processor makes of its size; the processor's own resize is the identity."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(do_resize=False)
    size = view.width, view.height
    made = processor(source if source.size == size else source.resize(size, resample), return_tensors="np")
    assert made["image_grid_thw"].tolist() == [list(view.grid_thw)]
    rows = torch.from_numpy(np.ascontiguousarray(made["pixel_values"]).reshape(-1, 1176))
    if layout == "compact":
        rows = rows.view(-1, 3, 2, 196)[:, :, 0].reshape(-1, 588)
    assert torch.equal(view.pixel_values, rows.to(view.pixel_values.dtype))


# Values


def test_views_equal_the_processor(root: Path) -> None:
    async def main(pipe: ImagePipeline) -> list[ImageInput]:
        image = await pipe.open("noise.png", root)
        return await pipe.views(image, [image.low, image.high, image.crop((10, 30, 60, 100))])

    (low, high, crop), _ = run(main)
    with Image.open(root / "noise.png") as source:
        assert (high.width, high.height, low.width, low.height) == (140, 420, 56, 224)
        for view in (low, high):
            assert_like_processor(view, source)
    assert low.visual_tokens == 16 and high.pixel_values.shape == (300, 1176)
    assert crop.pixel_values.shape == (crop.grid_thw[1] * crop.grid_thw[2], 1176)


def test_a_crop_sees_its_own_pixels_only(root: Path) -> None:
    async def main(pipe: ImagePipeline) -> tuple[Any, ImageInput]:
        image = await pipe.open("photo.png", root)
        plan = image.crop((28, 28, 84, 84))
        return plan, await pipe.view(image, plan)

    (plan, view), _ = run(main)
    with Image.open(root / "photo.png") as source:
        assert_like_processor(view, source.crop(plan.source_box))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["full", "compact"])
@pytest.mark.parametrize("resample", ["bicubic", "lanczos"])
def test_layouts_dtypes_and_filters(root: Path, layout: str, dtype: torch.dtype, resample: str) -> None:
    async def main(pipe: ImagePipeline) -> ImageInput:
        image = await pipe.open("photo.png", root)
        return await pipe.view(image, image.low)

    view, _ = run(main, layout=layout, dtype=dtype, resample=resample)
    with Image.open(root / "photo.png") as source:
        assert_like_processor(view, source, layout, getattr(Image.Resampling, resample.upper()))
    assert view.pixel_values.dtype == dtype and view.pixel_values.is_contiguous()


def test_real_images_equal_the_processor(data_dir: Path) -> None:
    """Two images of each set of the data folder, low and high view."""
    paths = [path for folder in sorted(data_dir.glob("*/images")) for path in sorted(folder.iterdir())[:2]]
    if not paths:
        pytest.skip("the data folder holds no images")

    async def main(pipe: ImagePipeline) -> None:
        for path in paths:
            image = await pipe.open(str(path.relative_to(data_dir)), data_dir)
            views = await pipe.views(image, [image.low, image.high])
            with Image.open(path) as file:
                source = file.convert("RGB")
            for view in views:
                assert_like_processor(view, source)
            assert views[0].visual_tokens <= views[1].visual_tokens

    _, counts = run(main)
    assert counts["images_decoded"] == len(paths)


# Hashes


def test_content_hash_identifies_pixel_values(root: Path) -> None:
    async def hashes(pipe: ImagePipeline) -> list[str]:
        image, same = await pipe.open("photo.png", root), await pipe.open("photo.bmp", root)
        assert image.content_hash == same.content_hash
        other = await pipe.open("noise.png", root)
        plans = [image.low, image.high, plan_scale(image.high, Fraction(3, 4)), image.crop((0, 0, 56, 56))]
        made = [view.content_hash for view in await pipe.views(image, plans)]
        assert made == [view.content_hash for view in await pipe.views(same, plans)]
        moved = dataclasses.replace(plans[3], source_box=(1, 0, 113, 112))
        return [*made, (await pipe.view(image, moved)).content_hash, (await pipe.view(other, image.low)).content_hash]

    found = [
        *run(hashes)[0],
        *run(hashes, layout="compact")[0],
        *run(hashes, dtype=torch.bfloat16)[0],
        *run(hashes, resample="lanczos")[0],
    ]
    assert len(set(found)) == len(found) == 24
    assert found[:6] == run(hashes)[0]


def test_content_hash_depends_on_the_shape(tmp_path: Path) -> None:
    Image.new("RGB", (60, 30)).save(tmp_path / "wide.png")
    Image.new("RGB", (30, 60)).save(tmp_path / "tall.png")

    async def main(pipe: ImagePipeline) -> set[str]:
        return {(await pipe.open(name, tmp_path)).content_hash for name in ("wide.png", "tall.png")}

    assert len(run(main)[0]) == 2


# Work done once


def test_each_image_is_decoded_once_and_each_view_made_once(root: Path) -> None:
    async def episode(pipe: ImagePipeline, name: str) -> None:
        image = await pipe.open(name, root)
        await pipe.view(image, image.low)
        await asyncio.sleep(0)
        await pipe.view(image, image.high)

    async def main(pipe: ImagePipeline) -> None:
        names = ["photo.png", "copy.png", "noise.png"] * 20
        await asyncio.gather(*(episode(pipe, name) for name in names))

    _, counts = run(main)
    assert counts["images_decoded"] == 2 and counts["views_patchified"] == 4


def test_the_high_view_is_not_made_unasked(root: Path) -> None:
    async def main(pipe: ImagePipeline) -> None:
        image = await pipe.open("photo.png", root)
        await pipe.view(image, image.low)
        assert pipe.stats()["views_patchified"] == 1
        await pipe.views(image, [image.low, image.high, image.high])
        assert pipe.stats()["views_patchified"] == 2

    run(main)


def test_both_views_come_from_one_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = pipeline_module.patchify

    def counting(image: Any, targets: Any, **options: Any) -> Any:
        calls.append(len(targets))
        return real(image, targets, **options)

    monkeypatch.setattr(pipeline_module, "patchify", counting)

    async def main(pipe: ImagePipeline) -> None:
        image = await pipe.open("photo.png", root)
        low, high = await pipe.views(image, [image.low, image.high])
        assert low.visual_tokens < high.visual_tokens

    run(main)
    assert calls == [2]


def test_one_image_as_file_and_data_url_is_decoded_once(root: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode((root / "photo.png").read_bytes()).decode()

    async def main(pipe: ImagePipeline) -> None:
        first, second = await asyncio.gather(pipe.open("photo.png", root), pipe.open(url, root))
        assert first.content_hash == second.content_hash

    assert run(main)[1]["images_decoded"] == 1


def test_a_file_that_changes_is_seen(root: Path) -> None:
    async def main(pipe: ImagePipeline) -> None:
        first = await pipe.open("photo.png", root)
        (root / "photo.png").write_bytes((root / "noise.png").read_bytes())
        second = await pipe.open("photo.png", root)
        assert (first.width, second.width) == (300, 150)

    run(main)


def test_a_small_cache_works_again_with_equal_results(root: Path) -> None:
    async def main(pipe: ImagePipeline) -> list[ImageInput]:
        image = await pipe.open("photo.png", root)
        first = await pipe.view(image, image.high)
        assert pipe.stats()["cache_bytes"] == 0
        return [first, await pipe.view(image, image.high)]

    (first, second), counts = run(main, cache_bytes=0)
    assert first == second and torch.equal(first.pixel_values, second.pixel_values)
    assert counts["images_decoded"] == 3 and counts["views_patchified"] == 2


def test_cache_bytes_stay_within_the_bound(root: Path) -> None:
    async def main(pipe: ImagePipeline) -> None:
        for name in ("photo.png", "noise.png", "photo.bmp"):
            image = await pipe.open(name, root)
            await pipe.views(image, [image.low, image.high])
            assert pipe.stats()["cache_bytes"] <= 1_000_000

    assert run(main, cache_bytes=1_000_000)[1]["cache_evictions"] > 0


# Failures, cancellation, the end


@pytest.mark.parametrize(
    ("source", "code"),
    [("missing.png", "image_not_found"), ("text.png", "image_unsupported_format"), ("../x.png", "image_outside_root")],
)
def test_a_bad_image_fails_every_waiter_and_nothing_else(root: Path, source: str, code: str) -> None:
    async def main(pipe: ImagePipeline) -> None:
        asked = [pipe.open(name, root) for name in (source, "photo.png", source, source)]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [getattr(result, "code", None) for result in results] == [code, None, code, code]

    run(main)


def test_a_bad_image_can_be_mended(root: Path) -> None:
    async def main(pipe: ImagePipeline) -> int:
        with pytest.raises(ImageError):
            await pipe.open("text.png", root)
        (root / "text.png").write_bytes((root / "photo.png").read_bytes())
        return (await pipe.open("text.png", root)).width

    assert run(main)[0] == 300


def test_an_extreme_aspect_is_an_image_error(tmp_path: Path) -> None:
    Image.new("L", (1, 201)).save(tmp_path / "thin.png")
    Image.new("L", (1, 200)).save(tmp_path / "limit.png")

    async def main(pipe: ImagePipeline) -> None:
        with pytest.raises(ImageError) as caught:
            await pipe.open("thin.png", tmp_path)
        assert caught.value.code == "image_aspect_ratio"
        image = await pipe.open("limit.png", tmp_path)
        assert (await pipe.view(image, image.low)).visual_tokens >= 1

    run(main)


def test_one_pixel_image(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (255, 0, 0)).save(tmp_path / "dot.png")

    async def main(pipe: ImagePipeline) -> list[ImageInput]:
        image = await pipe.open("dot.png", tmp_path)
        return await pipe.views(image, [image.low, image.high])

    (low, high), _ = run(main, limits=PixelLimits())
    assert (low.grid_thw, high.grid_thw) == ((1, 2, 2), (1, 4, 4))
    assert high.pixel_values.view(16, 3, -1).std(dim=2).max() == 0


def test_a_cancelled_episode_leaves_the_others_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, started = threading.Event(), threading.Event()
    real = pipeline_module.decode_image

    def slow(data: bytes, limits: Any) -> Any:
        started.set()
        assert gate.wait(10)
        return real(data, limits)

    monkeypatch.setattr(pipeline_module, "decode_image", slow)

    async def main(pipe: ImagePipeline) -> None:
        tasks = [asyncio.create_task(pipe.open("photo.png", root)) for _ in range(3)]
        assert await asyncio.to_thread(started.wait, 10)
        tasks[0].cancel()
        gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert results[1].width == results[2].width == 300

    assert run(main)[1]["images_decoded"] == 1


def test_one_pipeline_serves_several_event_loops(root: Path) -> None:
    with ImagePipeline(LIMITS, num_workers=2) as pipe:

        async def episode() -> str:
            image = await pipe.open("photo.png", root)
            return (await pipe.view(image, image.low)).content_hash

        assert len({asyncio.run(episode()) for _ in range(3)}) == 1
        assert pipe.stats()["images_decoded"] == 1


def test_a_closed_pipeline_says_so(root: Path) -> None:
    pipe = ImagePipeline(LIMITS)
    pipe.close()
    pipe.close()
    with pytest.raises(RuntimeError, match="pipeline is closed"):
        asyncio.run(pipe.open("photo.png", root))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layout": "flat"}, "layout"),
        ({"dtype": torch.float64}, "dtype"),
        ({"resample": "box"}, "resample"),
        ({"num_workers": 0}, "num_workers"),
        ({"cache_bytes": -1}, "cache_bytes"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"pipeline.{named}"):
        ImagePipeline(**options)
