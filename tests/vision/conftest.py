"""Pictures and encoded files made on the spot."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Encode = Callable[..., bytes]


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def encode() -> Encode:
    """encode(image, kind, **options): the image as a file of a Pillow format."""
    return _encode


@pytest.fixture(scope="session")
def noise() -> Image.Image:
    """61x47 RGB noise."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (47, 61, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A smooth 96x64 RGB picture, no two corners alike."""
    y, x = np.mgrid[0:64, 0:96]
    return Image.fromarray(np.stack([x * 2, y * 3, x + y], axis=2).astype(np.uint8))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real images; the test is skipped where there is none."""
    found = Path(os.environ.get("VTENGINE_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not found.is_dir():
        pytest.skip(f"no real images at {found}; set VTENGINE_TEST_DATA")
    return found
