"""The vision tower of Qwen3-VL: learned positions, full attention, and features from several depths (deepstack)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtengine.model.attention import Runs
from vtengine.model.linear import Linear
from vtengine.model.positions import Grid
from vtengine.model.qwen3_config import Qwen3VisionConfig
from vtengine.model.tower import NORM_EPS, Names, Tables, Tower, VisionAttention
from vtengine.model.vision_plan import check_grid, frame_coordinates, runs_of


class Mlp(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.fc1 = Linear(size, inner)
        self.fc2 = Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Qwen3Block(nn.Module):
    def __init__(self, config: Qwen3VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, NORM_EPS)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, NORM_EPS)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, tables: Tables, frames: Runs) -> Tensor:
        x = x + self.attn(self.norm1(x), tables, frames)
        return x + self.mlp(self.norm2(x))


class Qwen3Merger(nn.Module):
    """Each 2x2 group of patches (four consecutive rows) becomes one visual token of the language model's width.

    deepstack: the norm is over the group, as one row; otherwise over each patch.
    """

    def __init__(self, config: Qwen3VisionConfig, deepstack: bool) -> None:
        super().__init__()
        self.inner = config.hidden_size * config.merge_unit
        self.deepstack = deepstack
        self.norm = nn.LayerNorm(self.inner if deepstack else config.hidden_size, NORM_EPS)
        self.fc1 = Linear(self.inner, self.inner)
        self.fc2 = Linear(self.inner, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        merged = self.norm(x.view(-1, self.inner)) if self.deepstack else self.norm(x).view(-1, self.inner)
        return self.fc2(F.gelu(self.fc1(merged)))


class Qwen3Tower(Tower):
    """Features: the tower's own output [V, H], then beside it what the merger of each deepstack block gives."""

    config: Qwen3VisionConfig

    def __init__(self, config: Qwen3VisionConfig) -> None:
        super().__init__(config, patch_bias=True)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Qwen3Block(config) for _ in range(config.depth))
        self.merger = Qwen3Merger(config, deepstack=False)
        self.deepstack = nn.ModuleList(Qwen3Merger(config, deepstack=True) for _ in config.deepstack_visual_indexes)

    def encode(self, pixel_values: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        plan = tower_plan(grids, self.config, pixel_values.device)
        x = self.patch_embed(pixel_values)
        learned = F.embedding(plan.corners, self.pos_embed.weight) * plan.weights[:, :, None]
        x = x + learned.sum(1).to(x.dtype)
        tables = self.tables(plan.rows, plan.columns)
        mergers = dict(zip(self.config.deepstack_visual_indexes, self.deepstack, strict=True))
        deep = []
        for index, block in enumerate(self.blocks):
            x = block(x, tables, plan.frames)
            if index in mergers:
                deep.append(mergers[index](x))
        return torch.cat([self.merger(x), *deep], 1)

    def names(self) -> Names:
        pairs = [("patch_embed", "patch_embed.proj"), ("pos_embed", "pos_embed")]
        for block in (f"blocks.{i}" for i in range(self.config.depth)):
            pairs += [(f"{block}.{path}", f"{block}.{path}") for path in ("norm1", "norm2", "attn.qkv", "attn.proj")]
            pairs += [(f"{block}.mlp.{fc}", f"{block}.mlp.linear_{fc}") for fc in ("fc1", "fc2")]
        mergers = [("merger", "merger")]
        mergers += [(f"deepstack.{i}", f"deepstack_merger_list.{i}") for i in range(len(self.deepstack))]
        for ours, theirs in mergers:
            pairs += [(f"{ours}.norm", f"{theirs}.norm")]
            pairs += [(f"{ours}.{fc}", f"{theirs}.linear_{fc}") for fc in ("fc1", "fc2")]
        return {ours: {theirs: 0} for ours, theirs in pairs}


@dataclass(frozen=True)
class TowerPlan:
    """Of P patches. frames: the sequences that attend to themselves. rows, columns: int64 [P], a patch's coordinates.

    corners int64 [P, 4], weights float32 [P, 4]: the learned positions around a patch, and what each counts.
    """

    frames: Runs
    rows: Tensor
    columns: Tensor
    corners: Tensor
    weights: Tensor


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def tower_plan(grids: tuple[Grid, ...], config: Qwen3VisionConfig, device: torch.device) -> TowerPlan:
    """grids: (t, h, w) in patches, h and w multiples of the merge size. Raises ValueError for anything else."""
    merge, side = config.spatial_merge_size, config.position_side
    places, corners, weights, lengths = [], [], [], []
    for t, h, w in grids:
        check_grid((t, h, w), merge)
        place = frame_coordinates(h, w, merge)
        above, left = _between(place[0], h, side), _between(place[1], w, side)
        places += [place] * t
        corners += [(above[0][:, :, None] * side + left[0][:, None, :]).reshape(-1, 4)] * t
        weights += [(above[1][:, :, None] * left[1][:, None, :]).reshape(-1, 4)] * t
        lengths += [h * w] * t
    rows, columns = torch.from_numpy(np.concatenate(places, axis=1)).to(device)
    return TowerPlan(
        frames=runs_of(lengths),
        rows=rows,
        columns=columns,
        corners=torch.from_numpy(np.concatenate(corners)).to(device),
        weights=torch.from_numpy(np.concatenate(weights)).to(device),
    )


def _between(index: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches `index` [P] of an axis of `size` -> the two learned positions around each, of `side`, and their weights.

    int64 and float32 [P, 2]. The first patch lies on the first position and the last on the last. Float32 operation by
    operation as in transformers, so that weights are the same.
    """
    place = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    first = np.floor(place)
    positions = np.minimum(first.astype(np.int64)[:, None] + np.arange(2), side - 1)
    after = place - first
    return positions, np.stack((1 - after, after), axis=1)
