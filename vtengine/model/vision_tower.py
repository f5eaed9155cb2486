"""The vision tower of Qwen2.5-VL: most blocks attend inside windows only."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vtengine.model.layers import RMSNorm, SwiGLU
from vtengine.model.linear import Linear
from vtengine.model.positions import Grid
from vtengine.model.qwen2_5_config import VisionConfig
from vtengine.model.tower import NORM_EPS, Names, Tables, Tower, VisionAttention
from vtengine.model.vision_plan import VisionPlan, vision_plan


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
        x, normed = self.norm2.added(x, attended)
        return x + self.mlp(normed)


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


class VisionTower(Tower):
    config: VisionConfig

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def encode(self, pixel_values: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        patches, unit = len(pixel_values), self.config.merge_unit
        plan = vision_plan(grids, self.config, pixel_values.device)
        x = self.patch_embed(pixel_values)
        x = x.view(patches // unit, -1).index_select(0, plan.order).view(patches, -1)
        tables = self.tables(plan.rows, plan.columns)
        order = plan.image_order
        image_tables = tables if order is None else (tables[0].index_select(0, order), tables[1].index_select(0, order))
        for index, block in enumerate(self.blocks):
            full = index in self.config.fullatt_block_indexes
            x = block(x, tables, plan, image_tables if full else None)
        return self.merger(x).index_select(0, plan.restore)

    def names(self) -> Names:
        found: Names = {"patch_embed": {"patch_embed.proj": 0}}
        inner = self.config.intermediate_size
        for block in (f"blocks.{i}" for i in range(self.config.depth)):
            for path in ("norm1", "norm2", "attn.qkv", "attn.proj"):
                found[f"{block}.{path}"] = {f"{block}.{path}": 0}
            found[f"{block}.mlp.gate_up"] = {f"{block}.mlp.gate_proj": inner, f"{block}.mlp.up_proj": inner}
            found[f"{block}.mlp.down"] = {f"{block}.mlp.down_proj": 0}
        for ours, theirs in (("ln_q", "ln_q"), ("fc1", "mlp.0"), ("fc2", "mlp.2")):
            found[f"merger.{ours}"] = {f"merger.{theirs}": 0}
        return found
