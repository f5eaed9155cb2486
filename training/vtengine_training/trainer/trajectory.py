"""What training keeps of an episode: ids, mask, log-probabilities, positions and pixels. Saved with checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtengine.engine.base import ImageInput
from vtengine.rollout.episode import Episode
from vtengine.rollout.transcript import ImageSpan


@dataclass(frozen=True, eq=False)
class Trajectory:
    """token_ids int64 [T], positions int64 [3, T], trainable bool [T], logprobs float32 [T] as the engine sampled.

    version: the oldest weights that sampled a token of it. facts: figures for the metrics, by name.
    turn_advantages: one per sampled turn, if they differ; without them every token has `advantage`.
    """

    token_ids: np.ndarray
    positions: Tensor = field(repr=False)
    trainable: np.ndarray = field(repr=False)
    logprobs: np.ndarray = field(repr=False)
    images: tuple[ImageSpan, ...] = field(repr=False)
    version: int
    advantage: float
    facts: Mapping[str, float]
    turn_advantages: tuple[float, ...] = ()

    @property
    def token_advantages(self) -> np.ndarray:
        """float32 [trainable tokens]. A turn is a run of trainable tokens: what the environment says lies between."""
        if not self.turn_advantages:
            return np.full(self.num_trainable, self.advantage, dtype=np.float32)
        begins = self.trainable & ~np.concatenate([[False], self.trainable[:-1]])
        turn = np.cumsum(begins)[self.trainable] - 1
        return np.array(self.turn_advantages, dtype=np.float32)[turn]

    @property
    def num_trainable(self) -> int:
        return int(self.trainable.sum())

    @property
    def prompt_length(self) -> int:
        """Tokens before the first sampled one."""
        return int(self.trainable.argmax())

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, eq=False)
class Group:
    """The siblings of one prompt. draw: its number in the sampler's order. step: the one that sampled it."""

    draw: int
    example: int
    step: int
    trajectories: tuple[Trajectory, ...]


def from_episode(
    episode: Episode, advantage: float, facts: Mapping[str, float], turn_advantages: tuple[float, ...] = ()
) -> Trajectory:
    """The training side of an episode. Raises ValueError where nothing was sampled."""
    transcript = episode.transcript
    if not transcript.sampled:
        raise ValueError(f"episode of question {episode.question.id}: holds no sampled token")
    return Trajectory(
        np.array(transcript.token_ids, dtype=np.int64),
        transcript.positions(),
        np.array(transcript.trainable, dtype=bool),
        np.array(transcript.logprobs, dtype=np.float32),
        tuple(transcript.images),
        min(span.weight_version for span in transcript.sampled),
        advantage,
        dict(facts),
        turn_advantages,
    )


def pack_groups(groups: Sequence[Group]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(tensors by name, plain JSON data): everything `unpack_groups` needs; each distinct image once."""
    tensors: dict[str, Tensor] = {}
    described = []
    for g, group in enumerate(groups):
        members = []
        for t, one in enumerate(group.trajectories):
            name = f"group.{g}.{t}"
            tensors[f"{name}.token_ids"] = torch.from_numpy(one.token_ids)
            tensors[f"{name}.positions"] = one.positions.contiguous()
            tensors[f"{name}.trainable"] = torch.from_numpy(one.trainable)
            tensors[f"{name}.logprobs"] = torch.from_numpy(one.logprobs)
            spans = []
            for span in one.images:
                tensors.setdefault(f"pixels.{span.image.content_hash}", span.image.pixel_values.contiguous())
                image = span.image
                spans.append([span.start, span.end, image.content_hash, list(image.grid_thw), image.patch])
            facts = dict(one.facts)
            own = {"version": one.version, "advantage": one.advantage, "turn_advantages": one.turn_advantages}
            members.append({"images": spans, "facts": facts, **own})
        described.append({"draw": group.draw, "example": group.example, "step": group.step, "members": members})
    return tensors, described


def unpack_groups(tensors: Mapping[str, Tensor], described: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The groups that `pack_groups` took apart."""
    images: dict[str, ImageInput] = {}
    groups = []
    for g, group in enumerate(described):
        members = []
        for t, one in enumerate(group["members"]):
            spans = []
            for start, end, key, grid, *patch in one["images"]:
                if key not in images:
                    images[key] = ImageInput(key, (grid[0], grid[1], grid[2]), tensors[f"pixels.{key}"], *patch)
                spans.append(ImageSpan(start, end, images[key]))
            parts = {
                key: tensors[f"group.{g}.{t}.{key}"] for key in ("token_ids", "positions", "trainable", "logprobs")
            }
            members.append(
                Trajectory(
                    parts["token_ids"].numpy(),
                    parts["positions"],
                    parts["trainable"].numpy(),
                    parts["logprobs"].numpy(),
                    tuple(spans),
                    one["version"],
                    one["advantage"],
                    one["facts"],
                    tuple(one["turn_advantages"]),
                )
            )
        groups.append(Group(group["draw"], group["example"], group["step"], tuple(members)))
    return groups
