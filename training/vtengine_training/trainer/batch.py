"""Trajectories packed without padding: a prompt that siblings share stands once; logits only at sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vtengine_kernels.shared_prefix_attention import PrefixTree
from vtengine_kernels.visual_scatter import Placement

from vtengine.engine.base import ImageInput
from vtengine_training.trainer.trajectory import Trajectory

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """T tokens of S sequences, N of them trainable, V visual tokens shown, from images of P patches.

    token_ids int64 [T], positions int64 [3, T]; tree: the T tokens as segments, prompts before what continues them.
    sources int64 [N]: the places whose hidden state predicts `targets` int64 [N]. rollout, advantages, weights
    float32 [N]. sequences int64 [N] in 0..S-1; versions int64 [N]: of the weights that sampled the sequence.
    pixel_values [P, 588 | 1176] or None, grids per image; placement: the tower's row behind each of the V placeholders,
    or None if they stand in its order.
    """

    token_ids: Tensor
    positions: Tensor
    tree: PrefixTree
    sources: Tensor
    targets: Tensor
    rollout: Tensor
    advantages: Tensor
    weights: Tensor
    sequences: Tensor
    versions: Tensor
    num_sequences: int
    pixel_values: Tensor | None
    grids: tuple[Grid, ...]
    placement: Placement | None

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on `device`; to a GPU through pinned memory, without waiting. Itself where it is there already."""
        if self.token_ids.device == device:
            return self

        def moved(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        own = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: moved(value) for name, value in own.items() if isinstance(value, Tensor)}
        if (at := self.placement) is not None:
            changed["placement"] = replace(at, rows=moved(at.rows), order=moved(at.order), starts=moved(at.starts))
        return replace(self, **changed)


def plan_micro_batches(
    groups: Sequence[Sequence[Trajectory]], max_tokens: int, share_prefix: bool = True
) -> list[list[tuple[int, int]]]:
    """Which trajectory (group, sibling) goes into which micro-batch, in order. max_tokens: packed tokens of one.

    Siblings stay together where they fit, because they share prompt and images; a longer trajectory goes alone.
    """
    batches: list[list[tuple[int, int]]] = []
    used = 0
    for g, group in enumerate(groups):
        tail = packed_lengths(group, share_prefix)
        whole = sum(tail)
        if batches and used + whole > max_tokens >= whole:
            batches.append([])
            used = 0
        for t, one in enumerate(group):
            added = tail[t] if batches and batches[-1][-1:] == [(g, t - 1)] else len(one)
            if not batches or (batches[-1] and used + added > max_tokens):
                batches.append([])
                used, added = 0, len(one)
            batches[-1].append((g, t))
            used += added
    return batches


def packed_lengths(group: Sequence[Trajectory], share_prefix: bool) -> list[int]:
    """Packed tokens of each sibling behind the one before."""
    lengths = [len(one) for one in group]
    for t in range(1, len(group)):
        if share_prefix and same_prompt(group[t - 1], group[t]):
            lengths[t] -= group[t].prompt_length
    return lengths


def same_prompt(first: Trajectory, second: Trajectory) -> bool:
    """Whether two trajectories begin with the same tokens and images, up to the first sampled token."""
    length = first.prompt_length
    return (
        second.prompt_length == length
        and np.array_equal(first.token_ids[:length], second.token_ids[:length])
        and torch.equal(first.positions[:, :length], second.positions[:, :length])
        and [image.content_hash for image in _images(first, 0, length)]
        == [image.content_hash for image in _images(second, 0, length)]
    )


@dataclass(frozen=True, eq=False)
class Layout:
    """Where trajectories lie in a pack: pieces (trajectory, begin, end) one after another, as a tree of segments.

    places: per trajectory, the pack's index of each of its tokens.
    """

    pieces: list[tuple[Trajectory, int, int]]
    tree: PrefixTree
    places: list[np.ndarray]

    @staticmethod
    def of(trajectories: Sequence[Trajectory], share_prefix: bool) -> Layout:
        """Neighbours with the same prompt share it."""
        pieces: list[tuple[Trajectory, int, int]] = []
        parents: list[int] = []
        places: list[np.ndarray] = []
        used, prompt, prompt_at = 0, -1, 0
        for index, one in enumerate(trajectories):
            follows = share_prefix and index > 0 and same_prompt(trajectories[index - 1], one)
            leads = share_prefix and index + 1 < len(trajectories) and same_prompt(one, trajectories[index + 1])
            shared = one.prompt_length if follows or leads else 0
            if shared and not follows:
                prompt, prompt_at = len(pieces), used
                pieces.append((one, 0, shared))
                parents.append(-1)
                used += shared
            pieces.append((one, shared, len(one)))
            parents.append(prompt if shared else -1)
            own = np.arange(used, used + len(one) - shared)
            places.append(np.concatenate([np.arange(prompt_at, prompt_at + shared), own]))
            used += len(own)
        tree = PrefixTree(tuple(end - begin for _, begin, end in pieces), tuple(parents))
        return Layout(pieces, tree, places)


def build_batch(
    trajectories: Sequence[Trajectory],
    weights: Sequence[float],
    share_images: bool = True,
    share_prefix: bool = True,
) -> MicroBatch:
    """Packs the trajectories in order, on the CPU. weights: that of each token of each trajectory."""
    layout = Layout.of(trajectories, share_prefix)
    trainable = [np.flatnonzero(one.trainable) for one in trajectories]
    sources = np.concatenate([places[at - 1] for places, at in zip(layout.places, trainable, strict=True)])
    targets = np.concatenate([one.token_ids[at] for one, at in zip(trajectories, trainable, strict=True)])
    counts = [len(at) for at in trainable]
    images = gather_images([image for piece in layout.pieces for image in _images(*piece)], share_images)

    def per_token(values: Sequence[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), counts))

    token_ids = np.concatenate([one.token_ids[begin:end] for one, begin, end in layout.pieces])
    return MicroBatch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.cat([one.positions[:, begin:end] for one, begin, end in layout.pieces], dim=1),
        tree=layout.tree,
        sources=torch.from_numpy(sources),
        targets=torch.from_numpy(targets),
        rollout=torch.from_numpy(np.concatenate([one.logprobs[one.trainable] for one in trajectories])),
        advantages=torch.from_numpy(np.concatenate([one.token_advantages for one in trajectories])),
        weights=per_token(weights),
        sequences=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        versions=torch.from_numpy(np.repeat([one.version for one in trajectories], counts)),
        num_sequences=len(trajectories),
        pixel_values=images[0],
        grids=images[1],
        placement=images[2],
    )


def gather_images(
    images: Sequence[ImageInput], share: bool
) -> tuple[Tensor | None, tuple[Grid, ...], Placement | None]:
    """images: in the order in which a pack shows them.

    Returns the pixels of the distinct ones one after another, their grids, and the tower's row behind each placeholder
    (None: as they come). Without `share` every appearance is an image of its own.
    """
    first_row: dict[object, int] = {}
    distinct: list[ImageInput] = []
    rows: list[np.ndarray] = []
    total = 0
    for image in images:
        key: object = (image.content_hash, image.grid_thw) if share else len(rows)
        if key not in first_row:
            first_row[key] = total
            distinct.append(image)
            total += image.visual_tokens
        rows.append(np.arange(first_row[key], first_row[key] + image.visual_tokens))
    if not distinct:
        return None, (), None
    pixels = torch.cat([image.pixel_values for image in distinct])
    placement = None if len(distinct) == len(rows) else Placement.of(np.concatenate(rows), total)
    return pixels, tuple(image.grid_thw for image in distinct), placement


def _images(one: Trajectory, begin: int, end: int) -> list[ImageInput]:
    """The images of a piece of a trajectory. A prompt never ends inside an image: what follows it was sampled."""
    return [span.image for span in one.images if begin <= span.start < end]
