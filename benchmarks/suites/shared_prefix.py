"""Training on groups of siblings: the shared prompt computed once, the vision tower once per distinct image (CPU).

`attention`: forward and backward of one layer's attention. `trunk`: of decoder layers of width 512 (8 heads, 2 key
heads). Both on n siblings with prefix P and reply R, against the same sequences written out, under torch's own
scaled_dot_product_attention and under our tiles. `trainer`: loss and gradients of one real mini-batch of `glance`
through the Learner, each saving on and off; peak memory is the growth of the process's resident set.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from memory import grown_mib
from torch import Tensor
from vtengine_kernels.shared_prefix_attention import PrefixTree
from vtengine_training.data.examples import Example
from vtengine_training.rewards.base import Score
from vtengine_training.rewards.penalty import PenaltyConfig
from vtengine_training.rewards.rewarder import RewardConfig, Rewarder
from vtengine_training.trainer.config import GrpoConfig
from vtengine_training.trainer.figures import StepFigures
from vtengine_training.trainer.loop import Run
from vtengine_training.trainer.step import Learner
from vtengine_training.trainer.trajectory import Group

from vtengine.config import build
from vtengine.model import AttentionContext, ModelConfig, PackedCausal, PackedTree, Qwen2_5_VL, TextConfig, VisionConfig
from vtengine.rollout.episode import Episode

TESTS = ["tests/kernels/test_shared_prefix_attention.py", "tests/training/trainer/test_update.py"]
GROUPS = ((8, 652, 128), (8, 652, 256), (8, 1066, 128), (8, 1066, 256), (16, 1066, 128), (16, 2048, 128))
LAYERS, HEADS, KV_HEADS, SIZE = 2, 8, 2, 64
_SHAPE = {"n": "Siblings", "prefix": "Prefix", "reply": "Reply", "token_ratio": "Token ratio"}
_TIMES = {
    "plain_ms": "Plain, torch, CPU ms",
    "tiles_ms": "Plain, our tiles, CPU ms",
    "shared_ms": "Shared, CPU ms",
    "speedup": "Against the faster plain one",
    "share_of_ratio": "Of the token ratio",
}
TABLES = {
    "shared-prefix-attention": {"columns": _SHAPE | _TIMES, "where": {"part": "attention"}},
    "shared-prefix-trunk": {"columns": _SHAPE | _TIMES, "where": {"part": "trunk"}},
    "shared-prefix-trainer": {
        "columns": {
            "vision": "Vision tower",
            "images": "Images once",
            "prefix": "Prompt once",
            "logits": "Fused loss",
            "tokens": "Tokens packed",
            "patches": "Patches encoded",
            "cpu_ms": "CPU ms",
            "peak_mib": "Peak memory, MiB",
            "speedup": "Against none",
        },
        "where": {"part": "trainer"},
    },
}


def run(context: Any) -> list[dict[str, Any]]:
    groups = ((2, 40, 9),) if context.quick else GROUPS
    model = trunk()
    rows = [row for group in groups for row in (attention_row(context, *group), trunk_row(context, model, *group))]
    return sorted(rows, key=lambda row: str(row["part"])) + trainer_rows(context)


def contexts(n: int, prefix: int, reply: int) -> dict[str, tuple[int, AttentionContext]]:
    """(tokens, attention) of each side."""
    whole, total = prefix + reply, n * (prefix + reply)
    return {
        "plain": (total, PackedCausal(range(0, total + 1, whole))),
        "tiles": (total, PackedTree(PrefixTree((whole,) * n, (-1,) * n))),
        "shared": (prefix + n * reply, PackedTree(PrefixTree((prefix, *[reply] * n), (-1, *[0] * n)))),
    }


def compared(
    context: Any, part: str, shape: tuple[int, int, int], sides: dict[str, Callable[[], object]]
) -> dict[str, Any]:
    found = context.compare(sides, rounds=3)
    seconds = {name: one.cpu_s for name, one in found.items()}
    n, prefix, reply = shape
    ratio = n * (prefix + reply) / (prefix + n * reply)
    speedup = min(seconds["plain"], seconds["tiles"]) / seconds["shared"]
    row = {"part": part, "n": n, "prefix": prefix, "reply": reply, "token_ratio": ratio}
    row |= {f"{name}_ms": 1e3 * value for name, value in seconds.items()}
    return row | {"speedup": speedup, "share_of_ratio": speedup / ratio}


def attention_row(context: Any, *shape: int) -> dict[str, Any]:
    def side(tokens: int, attention: AttentionContext) -> Callable[[], object]:
        q, k, v = (torch.randn(tokens, heads, SIZE, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS))
        grad = torch.randn(tokens, HEADS, SIZE)
        return lambda: torch.autograd.grad(attention.attend(0, q, k, v), (q, k, v), grad)

    n, prefix, reply = shape
    sides = {name: side(*one) for name, one in contexts(n, prefix, reply).items()}
    return compared(context, "attention", (n, prefix, reply), sides)


def trunk() -> Qwen2_5_VL:
    """Decoder layers of width 512; its other parts are as small as they can be."""
    text = TextConfig(
        vocab_size=64, hidden_size=HEADS * SIZE, intermediate_size=1536, num_layers=LAYERS, num_heads=HEADS,
        num_kv_heads=KV_HEADS, mrope_section=(8, 12, 12),
    )  # fmt: skip
    vision = VisionConfig(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=1, out_hidden_size=HEADS * SIZE,
        fullatt_block_indexes=(0,),
    )  # fmt: skip
    config = ModelConfig(
        vision=vision, text=text, image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4,
        bos_token_id=None, eos_token_id=5, tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    return Qwen2_5_VL.build(config, 0)


def trunk_row(context: Any, model: Qwen2_5_VL, *shape: int) -> dict[str, Any]:
    n, prefix, reply = shape
    parameters = [parameter for layer in model.layers for parameter in layer.parameters()]

    def side(name: str, tokens: int, attention: AttentionContext) -> Callable[[], object]:
        embeds = torch.randn(tokens, HEADS * SIZE, requires_grad=True)
        place = torch.arange(tokens)
        if name == "shared":
            place = torch.cat([place[:prefix], *[torch.arange(prefix, prefix + reply)] * n])
        else:
            place = place % (prefix + reply)
        positions = place.expand(3, -1)

        def go() -> tuple[Tensor, ...]:
            hidden = model.decode(embeds, positions, attention)
            return torch.autograd.grad(hidden.square().sum(), [embeds, *parameters])

        return go

    sides = {name: side(name, *one) for name, one in contexts(n, prefix, reply).items()}
    return compared(context, "trunk", (n, prefix, reply), sides)


class Spread:
    """A reward that differs between siblings whatever the model says, so that every group has something to learn."""

    def __init__(self) -> None:
        self.asked = 0

    async def score(self, episode: Episode, example: Example) -> Score:
        self.asked += 1
        return Score(self.asked % 2, 0.0)


def trainer_rows(context: Any) -> list[dict[str, Any]]:
    prompts, n = (2, 3) if context.quick else (8, 8)
    with tempfile.TemporaryDirectory() as folder:
        data = {
            "model": "glance",
            "output": f"{folder}/run",
            "profile": "glance",
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "data": {"glance": {"seed": 5, "count": 4 * prompts}},
            "rollout": {"prompts": prompts, "n": n, "max_new_tokens": 64, "kv_mib": 128},
        }
        one = Run(build(GrpoConfig, data), Rewarder(RewardConfig(PenaltyConfig("off")), Spread()))
        try:
            groups = asyncio.run(one.parts.collector.collect(1)).groups
            return [row for vision in (True, False) for row in switched(context, one, groups, vision)]
        finally:
            asyncio.run(one.close())


def switched(context: Any, one: Run, groups: Sequence[Group], vision: bool) -> list[dict[str, Any]]:
    """Every combination of the three savings, interleaved."""
    learner = one.parts.learner
    one.parts.model.visual.requires_grad_(vision)
    policy = replace(learner.policy, train_vision=vision)

    def side(images: bool, prefix: bool, logits: bool) -> Learner:
        update = replace(
            one.config.update, share_images=images, share_prefix=prefix, logits="fused" if logits else "plain"
        )
        length = learner.cutter.constant_length
        return Learner(policy, learner.reference, learner.optimizer, learner.loss, update, length)

    sides = {switches: side(*switches) for switches in itertools.product((False, True), repeat=3)}
    built = {key: probe.cutter.whole(groups) for key, probe in sides.items()}
    calls = {key: lambda p=probe, b=built[key]: p.backward(b, StepFigures()) for key, probe in sides.items()}
    found = context.compare(calls, rounds=3)
    peaks = {key: grown_mib(call) for key, call in calls.items()}
    return [
        {
            "part": "trainer",
            "vision": "trained" if vision else "frozen",
            "images": images,
            "prefix": prefix,
            "logits": logits,
            "tokens": sum(len(batch.token_ids) for batch in built[key].batches),
            "patches": sum(len(batch.pixel_values) for batch in built[key].batches if batch.pixel_values is not None),
            "cpu_ms": 1e3 * measured.cpu_s,
            "peak_mib": peaks[key],
            "speedup": found[False, False, False].cpu_s / measured.cpu_s,
        }
        for key, measured in found.items()
        for images, prefix, logits in [key]
    ]
