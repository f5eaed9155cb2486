"""Trajectories packed end to end, without padding; logits are wanted only where a token was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vtengine.engine.base import ImageInput
from vtengine_training.trainer.trajectory import Trajectory

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """T tokens of S sequences, N of them trainable, V visual tokens shown, from images of P patches.

    token_ids int64 [T], positions int64 [3, T], offsets [S + 1]. sources int64 [N]: the positions whose hidden state
    predicts `targets` int64 [N]. rollout, advantages, weights float32 [N]. sequences int64 [N] in 0..S-1; versions
    int64 [N]: of the weights that sampled the sequence.
    pixel_values [P, 588 | 1176] or None, grids per image; visual_rows int64 [V]: the tower's rows, in the order of the
    placeholders, or None if that is the order they have.
    """

    token_ids: Tensor
    positions: Tensor
    offsets: tuple[int, ...]
    sources: Tensor
    targets: Tensor
    rollout: Tensor
    advantages: Tensor
    weights: Tensor
    sequences: Tensor
    versions: Tensor
    pixel_values: Tensor | None
    grids: tuple[Grid, ...]
    visual_rows: Tensor | None

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1


def plan_micro_batches(groups: Sequence[Sequence[Trajectory]], max_tokens: int) -> list[list[tuple[int, int]]]:
    """Which trajectory (group, sibling) goes into which micro-batch, in order.

    Siblings stay together where they fit, because they share images; a trajectory longer than max_tokens goes alone.
    """
    batches: list[list[tuple[int, int]]] = []
    used = 0
    for g, group in enumerate(groups):
        whole = sum(len(one) for one in group)
        if batches and used + whole > max_tokens >= whole:
            batches.append([])
            used = 0
        for t, one in enumerate(group):
            if not batches or (batches[-1] and used + len(one) > max_tokens):
                batches.append([])
                used = 0
            batches[-1].append((g, t))
            used += len(one)
    return batches


def build_batch(
    trajectories: Sequence[Trajectory], weights: Sequence[float], device: torch.device, share_images: bool = True
) -> MicroBatch:
    """Packs the trajectories in order. weights: that of each token of each trajectory."""
    lengths = [len(one) for one in trajectories]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    trainable = np.flatnonzero(np.concatenate([one.trainable for one in trajectories]))
    token_ids = np.concatenate([one.token_ids for one in trajectories])
    counts = [one.num_trainable for one in trajectories]
    pixels, grids, rows = gather_images(trajectories, share_images)

    def per_token(values: Sequence[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), counts)).to(device)

    return MicroBatch(
        token_ids=torch.from_numpy(token_ids).to(device),
        positions=torch.cat([one.positions for one in trajectories], dim=1).to(device),
        offsets=tuple(int(offset) for offset in offsets),
        sources=torch.from_numpy(trainable - 1).to(device),
        targets=torch.from_numpy(token_ids[trainable]).to(device),
        rollout=torch.from_numpy(np.concatenate([one.logprobs[one.trainable] for one in trajectories])).to(device),
        advantages=per_token([one.advantage for one in trajectories]),
        weights=per_token(weights),
        sequences=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device),
        versions=torch.from_numpy(np.repeat([one.version for one in trajectories], counts)).to(device),
        pixel_values=None if pixels is None else pixels.to(device),
        grids=grids,
        visual_rows=None if rows is None else rows.to(device),
    )


def gather_images(
    trajectories: Sequence[Trajectory], share: bool
) -> tuple[Tensor | None, tuple[Grid, ...], Tensor | None]:
    """(pixels of the distinct images one after another, their grids, rows of the tower's output per placeholder).

    Without `share` every appearance is an image of its own.
    """
    first_row: dict[object, int] = {}
    images: list[ImageInput] = []
    rows: list[np.ndarray] = []
    total = 0
    for span in (span for one in trajectories for span in one.images):
        key: object = (span.image.content_hash, span.image.grid_thw) if share else len(rows)
        if key not in first_row:
            first_row[key] = total
            images.append(span.image)
            total += span.image.visual_tokens
        rows.append(np.arange(first_row[key], first_row[key] + span.image.visual_tokens))
    if not images:
        return None, (), None
    pixels = torch.cat([image.pixel_values for image in images])
    order = None if len(images) == len(rows) else torch.from_numpy(np.concatenate(rows))
    return pixels, tuple(image.grid_thw for image in images), order
