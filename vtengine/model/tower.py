"""What vision towers have in common: how patches come in, attention between patches, and what goes out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from vtengine_kernels.layer_ops import rotary

from vtengine.model.attention import Runs, dense_attention
from vtengine.model.layers import inverse_frequencies, rotary_tables
from vtengine.model.linear import Linear, linear
from vtengine.model.positions import Grid
from vtengine.model.sizes import VisionSizes

NORM_EPS = 1e-6
ROPE_THETA = 10_000.0

Tables = tuple[Tensor, Tensor]
Names = dict[str, dict[str, int]]
"""Path of a module of ours -> the checkpoint's modules that its rows belong to, in order, and how many each has.

The only one: 0, for all of them.
"""


class PatchEmbed(nn.Module):
    """A linear map of a patch's values. weight [hidden, channels * temporal * patch * patch] (1176 or 1536 columns).

    Patches without their temporal copies (588 or 768) meet the weight summed over the copies: equal up to rounding.
    """

    def __init__(self, config: VisionSizes, bias: bool = False) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.patch_dim))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size)) if bias else None
        nn.init.normal_(self.weight, std=config.patch_dim**-0.5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        config, weight = self.config, self.weight
        if pixel_values.ndim != 2 or pixel_values.shape[1] not in (config.patch_dim, config.compact_dim):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: must be [patches, {config.patch_dim}] or "
                f"[patches, {config.compact_dim}] (without temporal copies)"
            )
        if pixel_values.shape[1] == config.compact_dim:
            copies = weight.unflatten(1, (config.in_channels, config.temporal_patch_size, config.patch_size**2))
            weight = copies.sum(2).flatten(1)
        return linear(pixel_values.to(weight.dtype), weight, self.bias)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionSizes) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, tables: Tables, runs: Runs) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (3 * self.heads, -1))
        rotated = rotary(qkv[:, : 2 * self.heads], *tables)
        q, k = rotated[:, : self.heads], rotated[:, self.heads :]
        return self.proj(dense_attention(q, k, qkv[:, 2 * self.heads :], runs).flatten(1))


class Tower(nn.Module):
    """Patches of one or many images in, one row of features per visual token out."""

    blocks: nn.ModuleList

    def __init__(self, config: VisionSizes, patch_bias: bool = False) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, patch_bias)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """pixel_values [P, patch_dim | compact_dim] in merge-window order, images one after another; grids (t, h, w) in
        patches.

        Returns [V, feature_size], V = P / 4: the visual tokens of all images in order, row-major inside an image.
        An image's features do not depend on what it is packed with. Raises ValueError where P and grids disagree.
        """
        shapes = tuple((int(t), int(h), int(w)) for t, h, w in grids)
        patches = sum(t * h * w for t, h, w in shapes)
        if patches != len(pixel_values):
            raise ValueError(f"pixel_values has {len(pixel_values)} rows, grids {list(shapes)} have {patches} patches")
        if not shapes:
            return pixel_values.new_zeros(0, self.config.feature_size)
        return self.encode(pixel_values, shapes)

    def encode(self, pixel_values: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        """What `forward` is once its arguments are checked."""
        raise NotImplementedError

    def names(self) -> Names:
        """All its modules that hold parameters, by their paths in the tower and in a checkpoint's."""
        raise NotImplementedError

    def tables(self, rows: Tensor, columns: Tensor) -> Tables:
        """int64 [P] coordinates -> rotary tables [P, 1, D]: the first half of the angles turns with the row, the second
        with the column."""
        frequencies = inverse_frequencies(self.config.head_dim // 2, ROPE_THETA, rows.device)
        return rotary_tables(torch.cat((rows[:, None] * frequencies, columns[:, None] * frequencies), -1))
