"""Image sources -> views ready for the vision tower: read, decode, plan, patchify on worker threads, each once.

    pipeline = ImagePipeline(PixelLimits(), layout="compact", dtype=torch.bfloat16)
    image = await pipeline.open("photo.jpg", root)
    low = await pipeline.view(image, image.low)

Decoding and patchify release the GIL, so they run beside the engine. Nothing about the high view is computed until it
is asked for. Memory: the cache, plus the encoded bytes of each open image; pixels that the cache has dropped are
decoded again.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from vtengine_kernels.patchify import CLIP_MEAN, CLIP_STD, Step, Target, patchify

from vtengine.vision.decode import DecodeLimits, decode_image
from vtengine.vision.fetches import Fetches
from vtengine.vision.image_input import ImageInput
from vtengine.vision.once import OnceCache
from vtengine.vision.plan import (
    LOW_VIEWS,
    PATCH,
    RESIZE_MODES,
    Box,
    LowView,
    PixelLimits,
    ResizeMode,
    ViewPlan,
    plan_crop,
    plan_high,
    plan_low,
    plan_low_half_first,
)
from vtengine.vision.source import SourceLimits, fetched_from, is_data_url, read_image_source

Filter = Literal["bicubic", "lanczos"]
Layout = Literal["full", "compact"]
READERS = 32
"""Threads that wait for disks."""
_RECIPE = "vtengine-view-1"  # part of every content hash; change it when the same plan gives other values


@dataclass(frozen=True, eq=False)
class SourceImage:
    """An image that was decoded, with the plans of its two standard views.

    content_hash: SHA-256 hex of size and decoded pixels: equal for the same picture in two files.
    width, height: pixels, upright. encoded: the file, kept so that evicted pixels can come back.
    """

    content_hash: str
    width: int
    height: int
    high: ViewPlan
    low: ViewPlan
    limits: PixelLimits = field(repr=False)
    file_hash: str = field(repr=False)
    encoded: bytes = field(repr=False)

    def crop(self, box: Box) -> ViewPlan:
        """The plan of a box in low-view pixels."""
        return plan_crop(self.width, self.height, self.low, box, self.limits)


@dataclass(frozen=True, eq=False)
class _Pixels:
    values: np.ndarray  # uint8 [H, W, 3], read-only
    content_hash: str


class ImagePipeline:
    """Opens images and makes their views. Coroutines may run concurrently, in any event loop."""

    def __init__(
        self,
        limits: PixelLimits | None = None,
        layout: Layout = "full",
        dtype: torch.dtype = torch.float32,
        num_workers: int | None = None,
        cache_bytes: int = 1 << 30,
        *,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        resample: Filter = "bicubic",
        resize_mode: ResizeMode = "pil13",
        low_view: LowView = "one_resize",
        device: torch.device | str = "cpu",
        decode_limits: DecodeLimits | None = None,
        source_limits: SourceLimits | None = None,
    ) -> None:
        """num_workers: threads that compute, None = one per core, at most 8; cache_bytes: pixels and finished views.

        mean, std: of the three channels. resize_mode, low_view: how pixels and the low view are made. All four are
        properties of the weights, as the patch in `limits` is (see vtengine.vision.plan). device: where views are made
        and stay; on CUDA the bytes of an image go up and the values are made there, equal bit by bit.
        A limit left out is the default of its class.
        """
        for name, value, allowed in (
            ("layout", layout, ("full", "compact")),
            ("resample", resample, ("bicubic", "lanczos")),
            ("resize_mode", resize_mode, RESIZE_MODES),
            ("low_view", low_view, LOW_VIEWS),
            ("dtype", dtype, (torch.float32, torch.bfloat16)),
        ):
            if value not in allowed:
                raise ValueError(f"pipeline.{name} = {value}: must be one of {', '.join(map(str, allowed))}")
        self.limits = limits or PixelLimits()
        self._layout = layout
        self._dtype = dtype
        self._normalisation = (tuple(mean), tuple(std))
        self._resample = resample
        self._resize_mode = resize_mode
        self._low_view = low_view
        self.device = torch.device(device)
        self._decode_limits = decode_limits or DecodeLimits()
        self._source_limits = source_limits or SourceLimits()
        if num_workers is None:
            num_workers = min(8, os.cpu_count() or 1)
        self._cache = OnceCache(num_workers, cache_bytes, "pipeline")
        self._reads = OnceCache(READERS, 0, "pipeline")
        self._fetches = Fetches()
        self._counts = {"files_read": 0, "images_decoded": 0, "views_patchified": 0}
        self._counting = threading.Lock()

    async def open(self, source: str, root: Path) -> SourceImage:
        """Reads and decodes `source` (path under root, data: URL, http(s) where allowed). Raises ImageError.

        A path is read at every call, so a changed file is seen; equal bytes are decoded once, whatever their source.
        """
        workers = self._cache if is_data_url(source) else self._reads  # base64 waits for nobody
        host = fetched_from(source)
        submit = None if host is None else partial(self._fetches.submit, host)
        read = await workers.get(("read", source, str(root)), lambda: self._read(source, root), lambda _: 0, submit)
        encoded, file_hash = read
        pixels = await self._pixels(encoded, file_hash)
        height, width, _ = pixels.values.shape
        high = plan_high(width, height, self.limits)
        halved = self._low_view == "half_first"
        low = plan_low_half_first(width, height, self.limits) if halved else plan_low(high)
        return SourceImage(pixels.content_hash, width, height, high, low, self.limits, file_hash, encoded)

    async def view(self, image: SourceImage, plan: ViewPlan) -> ImageInput:
        """One view of an opened image."""
        return (await self.views(image, (plan,)))[0]

    async def views(self, image: SourceImage, plans: Sequence[ViewPlan]) -> list[ImageInput]:
        """Several views, in the order of `plans`; those not made yet are made from one read of the pixels."""
        keys = [self._content_hash(image, plan) for plan in plans]
        made = self._cache.kept(keys)
        if made is None:
            pixels = await self._pixels(image.encoded, image.file_hash)
            todo = dict(zip(keys, plans, strict=True))
            made = await self._cache.get_all(
                keys, lambda wanted: self._patchify(pixels.values, {key: todo[key] for key in wanted}), _view_bytes
            )
        return list(made)

    def stats(self) -> dict[str, float]:
        """Work done and cache counters since the start."""
        cache = self._cache
        return {
            **self._counts,
            "cache_hits": cache.hits,
            "cache_shared": cache.shared,
            "cache_misses": cache.misses,
            "cache_evictions": cache.evictions,
            "cache_bytes": cache.used_bytes,
        }

    def forget(self) -> None:
        """Drops pixels and views that are kept: the next question has them made anew."""
        self._cache.forget()

    def close(self) -> None:
        """Finishes the work accepted, then refuses more. Blocks until the workers have ended. Fetches that still run
        are left to themselves."""
        self._reads.close()
        self._cache.close()

    def __enter__(self) -> ImagePipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _pixels(self, encoded: bytes, file_hash: str) -> _Pixels:
        found: _Pixels = await self._cache.get(
            ("pixels", file_hash), lambda: self._decode(encoded), lambda pixels: pixels.values.nbytes
        )
        return found

    def _read(self, source: str, root: Path) -> tuple[bytes, str]:
        self._count("files_read")
        encoded = read_image_source(source, root, self._source_limits)
        return encoded, hashlib.sha256(encoded).hexdigest()

    def _decode(self, encoded: bytes) -> _Pixels:
        self._count("images_decoded")
        values = decode_image(encoded, self._decode_limits)
        digest = hashlib.sha256(b"%d x %d\n" % values.shape[:2])
        digest.update(values.data)
        return _Pixels(values, digest.hexdigest())

    def _patchify(self, pixels: np.ndarray, plans: dict[str, ViewPlan]) -> list[ImageInput]:
        """The views of `plans`, keys being their content hashes, from one read of the pixels."""
        self._count("views_patchified", len(plans))
        targets = [
            Target(plan.height, plan.width, plan.source_box, before=() if plan.half is None else (Step(*plan.half),))
            for plan in plans.values()
        ]
        made = patchify(
            pixels,
            targets,
            filter=self._resample,
            layout=self._layout,
            dtype=self._dtype,
            mean=self._normalisation[0],
            std=self._normalisation[1],
            mode=self._resize_mode,
            patch=self.limits.patch,
            device=self.device,
        )
        pairs = zip(plans.items(), made, strict=True)
        return [ImageInput(key, plan.grid_thw, rows, plan.patch) for (key, plan), rows in pairs]

    def _content_hash(self, image: SourceImage, plan: ViewPlan) -> str:
        """Equal for equal pixel values: everything that they depend on."""
        box = plan.source_box or (0, 0, image.width, image.height)
        size = (plan.height, plan.width) if plan.half is None else (*plan.half, plan.height, plan.width)
        other: tuple[object, ...] = () if self._resize_mode == "pil13" else (self._resize_mode,)
        if (plan.patch, self._normalisation) != (PATCH, (CLIP_MEAN, CLIP_STD)):
            other += (plan.patch, *self._normalisation)
        parts = (_RECIPE, image.content_hash, box, *size, self._resample, *other, self._layout, self._dtype)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _count(self, name: str, by: int = 1) -> None:
        with self._counting:
            self._counts[name] += by


def _view_bytes(view: ImageInput) -> int:
    return view.pixel_values.nbytes
