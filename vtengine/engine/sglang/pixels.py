"""Our pixel values in the two forms that SGLang takes: the full patch layout (in-process), lossless PNG (over HTTP).

PNG is exact: pixel values are normalised bytes, so the bytes can be had back, and SGLang's processor finds an image of
the size it wants and does not resize it. What differs is the rounding of its normalisation (below 1e-6).
"""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from vtengine.engine.base import RequestRejected

if TYPE_CHECKING:
    from vtengine.engine.base import ImageInput

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP; the processors of the Qwen2.5-VL family all have these
STD = (0.26862954, 0.26130258, 0.27577711)
SIDE, MERGE, CHANNELS, FRAMES = 14, 2, 3, 2
NEAR = 0.05  # of one step of a byte; float32 comes within 1e-4


def full_layout(pixel_values: Tensor, patch_dim: int) -> Tensor:
    """[P, patch_dim / 2] or [P, patch_dim] -> [P, patch_dim] on the CPU, contiguous, in its dtype."""
    pixel_values = pixel_values.detach().cpu()
    if pixel_values.shape[1] == patch_dim:
        return pixel_values.contiguous()
    patches = pixel_values.view(len(pixel_values), CHANNELS, 1, -1)
    return patches.expand(-1, -1, FRAMES, -1).reshape(len(pixel_values), patch_dim)


def image_bytes(image: ImageInput) -> Tensor:
    """uint8 [H, W, 3]: the image that was normalised. Raises ValueError where that cannot be told exactly."""
    _, rows, columns = image.grid_thw
    values = image.pixel_values.detach().cpu().double()
    patch = CHANNELS * SIDE * SIDE
    if values.shape[1] != patch:
        values = values.view(len(values), CHANNELS, FRAMES, -1)[:, :, 0].reshape(len(values), patch)
    shape = (rows // MERGE, columns // MERGE, MERGE, MERGE, CHANNELS, SIDE, SIDE)
    pixels = values.view(shape).permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * SIDE, columns * SIDE, CHANNELS)
    pixels = (pixels * torch.tensor(STD, dtype=torch.float64) + torch.tensor(MEAN, dtype=torch.float64)) * 255
    whole = pixels.round()
    if not bool(((pixels - whole).abs() < NEAR).all()) or whole.min() < 0 or whole.max() > 255:
        raise ValueError(
            f"pixel_values ({str(image.pixel_values.dtype).removeprefix('torch.')}) are no normalised bytes, so they "
            "cannot be sent as a PNG; over HTTP use float32 pixels with the mean and std of CLIP"
        )
    return whole.to(torch.uint8)


class PngCache:
    """Data URLs by content hash, so that an image which is sent again (turn 2, siblings) is encoded once."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._urls: OrderedDict[tuple[str, tuple[int, int, int]], str] = OrderedDict()

    def data_url(self, image: ImageInput, request_id: str) -> str:
        """Raises RequestRejected for pixels that are no normalised bytes."""
        key = (image.content_hash, image.grid_thw)
        if key in self._urls:
            self._urls.move_to_end(key)
            return self._urls[key]
        try:
            pixels = image_bytes(image)
        except ValueError as error:
            raise RequestRejected("pixels_not_exact", f"request {request_id}: {error}", "setup") from None
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, "PNG", compress_level=1)
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        self._urls[key] = url
        self._bytes += len(url)
        while self._bytes > self._max_bytes and len(self._urls) > 1:
            self._bytes -= len(self._urls.popitem(last=False)[1])
        return url
