"""Shared-prefix training on a GPU: attention and decoder layers in bfloat16, against flash over the sequences in full.

`flop_ratio` is what sharing saves at best: multiplications of the plain path over those of the shared one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from memory import grown_on_gpu_mib
from torch import Tensor
from vtengine_kernels.shared_prefix_attention import PrefixTree
from vtengine_kernels.visual_scatter import Placement, visual_scatter

from vtengine.model import PackedTree
from vtengine.model.config import TextConfig
from vtengine.model.language import TextAttention, TextLayer
from vtengine.model.layers import rotary_tables

TESTS = ["-m", "gpu", "tests/kernels/test_shared_prefix_attention.py", "tests/kernels/test_visual_scatter.py"]
GROUPS = ((8, 652, 256), (16, 1066, 256), (16, 2048, 256), (16, 2048, 512))
HIDDEN, INNER, HEADS, KV_HEADS, SIZE = 3584, 18944, 28, 4, 128  # a layer of Qwen2.5-VL-7B
TABLES = {
    "gpu-shared-prefix": {
        "columns": {
            "part": "Part",
            "n": "Siblings",
            "prefix": "Prefix",
            "reply": "Reply",
            "flop_ratio": "FLOP ratio",
            "plain_ms": "Plain, ms",
            "shared_ms": "Shared, ms",
            "speedup": "Times as fast",
            "share_of_ratio": "Of the ratio",
            "plain_mib": "Plain, peak MiB",
            "shared_mib": "Shared, peak MiB",
        },
        "where": {"kind": "prefix"},
    },
    "gpu-visual-scatter": {
        "columns": {"places": "Places", "features": "Features", "ms": "Backward, ms", "gb_per_s": "GB/s"},
        "where": {"kind": "scatter"},
    },
}


def run(context: Any) -> Iterator[dict[str, Any]]:
    groups = GROUPS[:1] if context.quick else GROUPS
    torch.manual_seed(0)
    layer = text_layer()
    for group in groups:
        yield attention_row(context, *group)
        yield layer_row(context, layer, *group)
    for size in ((2048, 8), (16384, 16)):
        yield scatter_row(context, *size)


def trees(n: int, prefix: int, reply: int) -> dict[str, PrefixTree]:
    return {
        "plain": PrefixTree((prefix + reply,) * n, (-1,) * n),
        "shared": PrefixTree((prefix, *[reply] * n), (-1, *[0] * n)),
    }


def multiplications(tree: PrefixTree, per_token: int) -> float:
    """Per query head and dimension of attention (two products), plus per_token of the layer's matrices."""
    pairs = 0.0
    for segment, length in enumerate(tree.lengths):
        above = sum(tree.lengths[a] for a in tree.ancestors[segment])
        pairs += length * above + length * (length + 1) / 2
    return 2 * HEADS * SIZE * pairs + per_token * tree.num_tokens


def compared(
    context: Any, part: str, group: tuple[int, int, int], per_token: int, make: Callable[..., Any]
) -> dict[str, Any]:
    sides = {name: make(tree) for name, tree in trees(*group).items()}
    found = context.compare(sides, rounds=5, warmup=2, min_round_s=0.02, after=torch.cuda.synchronize)
    peaks = {name: grown_on_gpu_mib(side) for name, side in sides.items()}
    plain, shared = (multiplications(tree, per_token) for tree in trees(*group).values())
    speedup = found["plain"].median_s / found["shared"].median_s
    row: dict[str, Any] = {"kind": "prefix", "part": part} | dict(zip(("n", "prefix", "reply"), group, strict=True))
    row |= {"flop_ratio": plain / shared, "speedup": speedup, "share_of_ratio": speedup * shared / plain}
    for name in sides:
        row |= {f"{name}_ms": 1e3 * found[name].median_s, f"{name}_mib": peaks[name]}
    return row


def attention_row(context: Any, *group: int) -> dict[str, Any]:
    def make(tree: PrefixTree) -> Callable[[], object]:
        q, k, v = (
            torch.randn(tree.num_tokens, heads, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        grad = torch.randn_like(q)
        return lambda: torch.autograd.grad(PackedTree(tree).attend(0, q, k, v), (q, k, v), grad)

    n, prefix, reply = group
    return compared(context, "attention", (n, prefix, reply), 0, make)


def text_layer() -> TextLayer:
    config = TextConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=INNER, num_layers=1, num_heads=HEADS,
        num_kv_heads=KV_HEADS, mrope_section=(16, 24, 24),
    )  # fmt: skip
    return TextLayer(config, TextAttention(config)).to("cuda", torch.bfloat16)


def layer_row(context: Any, layer: TextLayer, *group: int) -> dict[str, Any]:
    def make(tree: PrefixTree) -> Callable[[], object]:
        x = torch.randn(tree.num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        cos, sin = rotary_tables(torch.rand(tree.num_tokens, SIZE // 2, device="cuda"))
        grad = torch.randn_like(x)
        inputs: list[Tensor] = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x, cos, sin, 0, PackedTree(tree), None), inputs, grad)

    n, prefix, reply = group
    matrices = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)
    return compared(context, "layer", (n, prefix, reply), matrices, make)


def scatter_row(context: Any, features: int, shown: int) -> dict[str, Any]:
    placement = Placement.of(np.tile(np.arange(features), shown), features, "cuda")
    x = torch.randn(features, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = visual_scatter(x, placement)
    grad = torch.randn_like(out)

    def backward() -> object:
        return torch.autograd.grad(out, x, grad, retain_graph=True)

    found = context.compare({"backward": backward}, rounds=5, min_round_s=0.02, after=torch.cuda.synchronize)
    seconds = found["backward"].median_s
    moved = 2 * (grad.numel() + x.numel())
    row = {"kind": "scatter", "places": len(grad), "features": features}
    return row | {"ms": 1e3 * seconds, "gb_per_s": moved / seconds / 1e9}
