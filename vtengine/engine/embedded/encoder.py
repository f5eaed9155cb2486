"""Visual features for sequences: from the cache, or encoded once for all who want them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtengine.engine.embedded.vision_cache import FeatureKey, VisionCache

if TYPE_CHECKING:
    from vtengine.engine.base import ImageInput
    from vtengine.engine.embedded.sequence import Sequence
    from vtengine.model import VLModel

# Patches per call of the vision tower (a larger image goes alone). On a GPU this bounds its activations; on a CPU more
# rows make no product faster, and what a layer makes of more falls out of the caches before the next one reads it.
MAX_PATCHES = {"cpu": 1024}
MAX_PATCHES_ELSEWHERE = 16384

Wanted = tuple["Sequence", int]
"""A sequence and the index of an image of its request."""
Claims = dict[FeatureKey, list[Wanted]]
"""Who wants an image, by what the image is known by; the first of them has it encoded."""


class ImagesTooLarge(Exception):
    """Each of some images, alone in the tower, takes more memory than the GPU has left. sequences: who wanted them."""

    def __init__(self, claimants: list[Wanted]) -> None:
        self.sequences = {sequence for sequence, _ in claimants}
        patches = min(len(sequence.spans[index].image.pixel_values) for sequence, index in claimants)
        super().__init__(
            f"an image of {patches} patches does not fit into the GPU's memory beside the weights and the cache: show "
            "less of it (--scale), or lower --kv-gb (engine.kv_bytes)"
        )


class Encoder:
    """Owns the features. reuse False: each of a sequence's images is encoded for that sequence alone.

    On CUDA the tower has a stream of its own, whichever thread runs it, so that a thread beside the engine's can.
    """

    def __init__(self, model: VLModel, cache: VisionCache, reuse: bool) -> None:
        self.model = model
        self.cache = cache
        self.reuse = reuse
        self.weight_version = 0
        self.num_encoded = 0
        self.num_shared = 0
        self.max_patches = MAX_PATCHES.get(model.device.type, MAX_PATCHES_ELSEWHERE)
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    def encode(self, wanted: Iterable[Wanted]) -> None:
        """Gives each sequence the features of its image. Raises ImagesTooLarge once all others have theirs."""
        claims: Claims = {}
        for sequence, index in wanted:
            key = self.key(sequence, index)
            known = self.cache.get(key)
            if known is None:
                claims.setdefault(key, []).append((sequence, index))
            else:
                sequence.features[index] = known
        if self._fits(claims):
            return
        alone = {key: self._fits({key: claimants}) for key, claimants in claims.items()}
        if not all(alone.values()):
            raise ImagesTooLarge([one for key, claimants in claims.items() if not alone[key] for one in claimants])

    def _fits(self, claims: Claims) -> bool:
        """Encodes and gives, unless the GPU's memory is too small for that."""
        try:
            features = self.run_tower(images_of(claims))
        except torch.OutOfMemoryError:
            return False
        self.give(claims, features)
        return True

    def key(self, sequence: Sequence, index: int) -> FeatureKey:
        image = sequence.spans[index].image
        content = image.content_hash if self.reuse else f"{sequence.arrival}.{index}"
        return content, image.grid_thw, self.weight_version

    def give(self, claims: Claims, features: Iterable[Tensor]) -> None:
        for (key, claimants), encoded in zip(claims.items(), features, strict=True):
            for sequence, index in claimants:
                sequence.features[index] = encoded
            first, index = claimants[0]
            first.encoded[index] = True
            self.cache.put(key, encoded)
            self.num_shared += len(claimants) - 1
        self.num_encoded += len(claims)

    def run_tower(self, images: list[ImageInput]) -> list[Tensor]:
        """Features per image, there when this returns. For any thread."""
        if self._stream is None:
            return self._run_tower(images)
        passes = torch.cuda.default_stream(self.model.device)
        self._stream.wait_stream(passes)  # pixels may have been made there
        with torch.cuda.stream(self._stream):
            features = self._run_tower(images)
        for of_image in features:
            of_image.record_stream(passes)  # where they are read: their memory is not given to the tower before that
        self._stream.synchronize()
        return features

    @torch.inference_mode()
    def _run_tower(self, images: list[ImageInput]) -> list[Tensor]:
        """Similar pixel layouts go through the tower together."""
        features: dict[int, Tensor] = {}
        for width in sorted({image.pixel_values.shape[1] for image in images}):
            batch: list[int] = []
            for index in [i for i, image in enumerate(images) if image.pixel_values.shape[1] == width] + [-1]:
                patches = sum(len(images[i].pixel_values) for i in batch)
                if batch and (index < 0 or patches + len(images[index].pixel_values) > self.max_patches):
                    features |= zip(batch, self._run_tower_once([images[i] for i in batch]), strict=True)
                    batch = []
                batch.append(index)
        return [features[index] for index in range(len(images))]

    def _run_tower_once(self, images: list[ImageInput]) -> list[Tensor]:
        device, dtype = self.model.device, self.model.dtype
        pieces = [image.pixel_values.to(device=device, dtype=dtype) for image in images]  # they may come from several
        pixels = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        features = self.model.visual(pixels, [image.grid_thw for image in images])
        # Copies: a slice would keep the features of the whole batch alive in the cache.
        return [piece.clone() for piece in features.split([image.visual_tokens for image in images])]


def images_of(claims: Claims) -> list[ImageInput]:
    return [claimants[0][0].spans[claimants[0][1]].image for claimants in claims.values()]
