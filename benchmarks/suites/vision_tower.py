"""The vision tower at the width of Qwen2.5-VL-3B against transformers' own, on the CPU, float32.

`attention`: window attention of one layer, given q, k and v: full windows as one batch and ragged borders apart,
against one call per window, as transformers does. `tower`: patch embedding, a layer and the merger, the layer with
window or with full attention, both sides without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from vtengine.model import VisionConfig
from vtengine.model.attention import dense_attention
from vtengine.model.vision_plan import vision_plan
from vtengine.model.vision_tower import VisionTower

TESTS = ["tests/model/test_parity.py", "tests/model/test_vision_plan.py"]
SIZES = {"1": (1008, 1036), "4": (2016, 2044), "12": (3080, 3892)}  # pixels, by megapixels
FULL = ("1", "4")  # at 12 megapixels full attention takes minutes, in the same torch call on both sides
_TIMES = {"ours_ms": "vtengine, CPU ms", "theirs_ms": "transformers, CPU ms", "speedup": "Times as fast"}
_SHAPE = {"megapixels": "Megapixels", "patches": "Patches"}
TABLES = {
    "vision-tower-windows": {
        "columns": _SHAPE | {"windows": "Windows"} | _TIMES,
        "where": {"part": "attention"},
    },
    "vision-tower": {"columns": _SHAPE | {"layer": "Layer"} | _TIMES, "where": {"part": "tower"}},
}


def run(context: Any) -> list[dict[str, Any]]:
    sizes = {"0.1": (252, 364)} if context.quick else SIZES
    with torch.inference_mode():
        attention = [attention_row(context, name, *size) for name, size in sizes.items()]
        tower = [
            tower_row(context, name, *size, layer)
            for layer in ("window", "full")
            for name, size in sizes.items()
            if layer == "window" or name in FULL or context.quick
        ]
    return attention + tower


def config_of(layer: str) -> VisionConfig:
    full = (0,) if layer == "full" else ()
    return VisionConfig(
        depth=1,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=2048,
        fullatt_block_indexes=full,
    )


def measured(context: Any, sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    found = context.compare(sides, rounds=rounds)
    ours, theirs = found["ours"].cpu_s, found["theirs"].cpu_s
    return {"ours_ms": 1e3 * ours, "theirs_ms": 1e3 * theirs, "speedup": theirs / ours}


def attention_row(context: Any, name: str, height: int, width: int) -> dict[str, Any]:
    config = config_of("window")
    plan = vision_plan(((1, height // 14, width // 14),), config, torch.device("cpu"))
    q, k, v = (torch.randn(plan.windows.total, config.num_heads, config.head_dim) for _ in range(3))

    def theirs() -> Tensor:
        parts = (x.transpose(0, 1).unsqueeze(0).split(plan.windows.lengths, dim=2) for x in (q, k, v))
        called = [F.scaled_dot_product_attention(*window).transpose(1, 2) for window in zip(*parts, strict=True)]
        return torch.cat(called, dim=1)

    torch.testing.assert_close(theirs()[0], dense_attention(q, k, v, plan.windows), rtol=1e-4, atol=1e-5)
    sides = {"ours": lambda: dense_attention(q, k, v, plan.windows), "theirs": theirs}
    row = {"part": "attention", "megapixels": name, "patches": len(q), "windows": len(plan.windows.lengths)}
    return row | measured(context, sides, rounds=5)


def tower_row(context: Any, name: str, height: int, width: int, layer: str) -> dict[str, Any]:
    config = config_of(layer)
    tower = VisionTower(config)
    theirs = Qwen2_5_VisionTransformerPretrainedModel._from_config(
        Qwen2_5_VLVisionConfig(
            depth=1,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_heads,
            out_hidden_size=config.out_hidden_size,
            fullatt_block_indexes=list(config.fullatt_block_indexes),
        ),
        attn_implementation="sdpa",
        dtype=torch.float32,
    ).eval()
    grid = (1, height // 14, width // 14)
    pixels = torch.randn(grid[1] * grid[2], config.patch_dim)
    grids = torch.tensor([grid])
    sides = {"ours": lambda: tower(pixels, [grid]), "theirs": lambda: theirs(pixels, grid_thw=grids)}
    row = {"part": "tower", "megapixels": name, "patches": len(pixels), "layer": layer}
    return row | measured(context, sides, rounds=3 if name == "1" else 1)
