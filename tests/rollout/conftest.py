"""A tiny byte-level tokenizer with the Qwen2.5 marks, the real one where it is there, and a pipeline of sizes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers

from tests.tiny_model import byte_encoder
from vtengine.engine.base import ImageInput
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.vision.errors import ImageError
from vtengine.vision.plan import Box, PixelLimits, ViewPlan, plan_crop, plan_high, plan_low

DATA = Path(os.environ.get("VTENGINE_TEST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
MERGES = (("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"))


@pytest.fixture(scope="session")
def plain_small() -> tokenizers.Tokenizer:
    return byte_encoder(MERGES)


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    return Tokenizer(byte_encoder(MERGES))


@pytest.fixture(scope="session")
def qwen_dir() -> Path:
    folder = DATA / "qwen2_5_tokenizer"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no Qwen2.5 tokenizer at {folder}")
    return folder


@pytest.fixture(scope="session")
def qwen_tokenizer(qwen_dir: Path) -> Tokenizer:
    return Tokenizer.load(qwen_dir)


@pytest.fixture(scope="session", params=["small", "qwen"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(f"{request.param}_tokenizer")


@dataclass(frozen=True)
class SizedImage:
    """What an episode reads of an opened image, without pixels."""

    content_hash: str
    width: int
    height: int
    high: ViewPlan
    low: ViewPlan

    def crop(self, box: Box) -> ViewPlan:
        return plan_crop(self.width, self.height, self.low, box, PixelLimits())


class SizedPipeline:
    """Sources look like "640x480"; anything else is not found. `views` is called before a view is handed out."""

    def __init__(self, on_view: Callable[[ViewPlan], None] = lambda plan: None) -> None:
        self.on_view = on_view
        self.num_views = 0

    async def open(self, source: str, root: Path) -> SizedImage:
        try:
            width, height = map(int, source.split("x"))
        except ValueError:
            raise ImageError("image_not_found", f"image {source!r}: no such file") from None
        high = plan_high(width, height, PixelLimits())
        return SizedImage(source, width, height, high, plan_low(high))

    async def view(self, image: SizedImage, plan: ViewPlan) -> ImageInput:
        self.on_view(plan)
        self.num_views += 1
        return sized_input(f"{image.content_hash}/{plan}", plan.grid_thw)


def sized_input(content_hash: str, grid_thw: tuple[int, int, int]) -> ImageInput:
    return ImageInput(content_hash, grid_thw, pixel_values=None)  # type: ignore[arg-type]


@pytest.fixture
def pipeline() -> SizedPipeline:
    return SizedPipeline()
