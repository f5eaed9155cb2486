"""The vision tower: patches of one or many images in, one feature row per visual token out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vtengine_kernels.layer_ops import rotary

from vtengine.model.attention import Runs, dense_attention
from vtengine.model.config import VisionConfig
from vtengine.model.layers import RMSNorm, SwiGLU, inverse_frequencies, rotary_tables
from vtengine.model.linear import Linear, linear
from vtengine.model.positions import Grid
from vtengine.model.vision_plan import VisionPlan, vision_plan

NORM_EPS = 1e-6
ROPE_THETA = 10_000.0

Tables = tuple[Tensor, Tensor]


class PatchEmbed(nn.Module):
    """A linear map of a patch's values. weight [hidden, channels * temporal * patch * patch] (1176 columns).

    Patches without their temporal copies (588 values) meet the weight summed over the copies: equal up to rounding.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.patch_dim))
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
        return linear(pixel_values.to(weight.dtype), weight)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, tables: Tables, runs: Runs) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (3 * self.heads, -1))
        rotated = rotary(qkv[:, : 2 * self.heads], *tables)
        q, k = rotated[:, : self.heads], rotated[:, self.heads :]
        return self.proj(dense_attention(q, k, qkv[:, 2 * self.heads :], runs).flatten(1))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, NORM_EPS)
        self.attn = VisionAttention(config)
        self.norm2 = RMSNorm(config.hidden_size, NORM_EPS)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, tables: Tables, plan: VisionPlan, image_tables: Tables | None) -> Tensor:
        """image_tables: given for full attention; in the images' order if the plan has one."""
        normed = self.norm1(x)
        if image_tables is None:
            attended = self.attn(normed, tables, plan.windows)
        elif plan.image_order is None or plan.image_restore is None:
            attended = self.attn(normed, image_tables, plan.images)
        else:
            attended = self.attn(normed.index_select(0, plan.image_order), image_tables, plan.images)
            attended = attended.index_select(0, plan.image_restore)
        x = x + attended
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Each 2x2 group of patches (four consecutive rows) becomes one visual token of the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.inner = config.hidden_size * config.merge_unit
        self.ln_q = RMSNorm(config.hidden_size, NORM_EPS)
        self.fc1 = Linear(self.inner, self.inner)
        self.fc2 = Linear(self.inner, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.ln_q(x).view(-1, self.inner))))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """pixel_values [P, 1176 | 588] in merge-window order, images one after another; grids (t, h, w) in patches.

        Returns [V, out_hidden_size], V = P / 4: the visual tokens of all images in order, row-major inside an image.
        An image's features do not depend on what it is packed with. Raises ValueError where P and grids disagree.
        """
        shapes = tuple((int(t), int(h), int(w)) for t, h, w in grids)
        patches = sum(t * h * w for t, h, w in shapes)
        if patches != len(pixel_values):
            raise ValueError(f"pixel_values has {len(pixel_values)} rows, grids {list(shapes)} have {patches} patches")
        if not shapes:
            return pixel_values.new_zeros(0, self.config.out_hidden_size)
        plan = vision_plan(shapes, self.config, pixel_values.device)
        unit = self.config.merge_unit
        x = self.patch_embed(pixel_values)
        x = x.view(patches // unit, -1).index_select(0, plan.order).view(patches, -1)
        tables = self._tables(plan)
        order = plan.image_order
        image_tables = tables if order is None else (tables[0].index_select(0, order), tables[1].index_select(0, order))
        for index, block in enumerate(self.blocks):
            full = index in self.config.fullatt_block_indexes
            x = block(x, tables, plan, image_tables if full else None)
        return self.merger(x).index_select(0, plan.restore)

    def _tables(self, plan: VisionPlan) -> Tables:
        """Rotary tables [P, 1, D]: the first half of the angles turns with the row, the second with the column."""
        frequencies = inverse_frequencies(self.config.head_dim // 2, ROPE_THETA, plan.rows.device)
        angles = (plan.rows[:, None] * frequencies, plan.columns[:, None] * frequencies)
        return rotary_tables(torch.cat(angles, -1))
