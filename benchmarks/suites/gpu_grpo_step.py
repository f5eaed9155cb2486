"""The trainer's learning on one GPU at the size of Qwen2.5-VL-3B: groups of siblings, each saving on and off.

Random weights (bfloat16, float32 masters) and made-up episodes: siblings share a prompt that shows the low view (1,024
visual tokens); every fourth is shown the high view (4,096) after its first reply and goes on. `s` is a whole call of
the Learner: cutting, forward and backward passes of all micro-batches, one optimiser step. `--quick` runs a small
model, also on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from memory import grown_on_gpu_mib
from qwen_sizes import PAD, model_of, shape
from vtengine_training.grpo.config import LossConfig
from vtengine_training.sft.config import OptimizerConfig
from vtengine_training.sft.optim import MasterAdamW
from vtengine_training.trainer.config import UpdateConfig
from vtengine_training.trainer.cost import ModelCost
from vtengine_training.trainer.policy import Policy
from vtengine_training.trainer.step import Learner
from vtengine_training.trainer.trajectory import Group, Trajectory

from vtengine.engine.base import ImageInput
from vtengine.model.positions import mrope_positions
from vtengine.rollout.transcript import ImageSpan

TESTS = ["-m", "gpu", "tests/kernels/test_shared_prefix_attention.py", "tests/kernels/test_grpo_loss_triton.py"]
PROMPTS, SIBLINGS, EVERY, ROUNDS = 2, 8, 4, 2
LOW_SIDE, HIGH_SIDE, TEXT_TOKENS, REPLY_TOKENS = 64, 128, 64, 256
MAX_TOKENS = 8192
WAYS = {
    "all": {},
    "no shared prompts": {"share_prefix": False},
    "no shared images": {"share_images": False},
    "plain logits": {"logits": "plain"},
    "none": {"share_prefix": False, "share_images": False, "logits": "plain"},
}
TABLES = {
    "gpu-grpo-step": {
        "columns": {
            "model": "Model",
            "savings": "Savings",
            "tokens": "Tokens packed",
            "patches": "Patches encoded",
            "s": "s per step",
            "trajectories_per_s": "Trajectories/s",
            "tflops": "TFLOP/s",
            "peak_mib": "Memory beside weights, MiB",
            "speedup": "Against none",
        }
    }
}


def run(context: Any) -> Iterator[dict[str, Any]]:
    name, sizes = shape("3B", context.quick)
    model = model_of(sizes, learns=True)
    optimizer = MasterAdamW(model.named_parameters(), OptimizerConfig(), own_masters=model.dtype != torch.float32)
    groups = [made_up(draw, model, context.quick) for draw in range(1 if context.quick else PROMPTS)]
    cost = ModelCost.of(model.config)
    learners = {way: learner(model, optimizer, changes) for way, changes in WAYS.items()}
    calls = {way: lambda one=one: one.learn(groups, 0.0) for way, one in learners.items()}
    after = torch.cuda.synchronize if torch.cuda.is_available() else None
    found = context.compare(calls, rounds=ROUNDS, after=after)
    for way, time in found.items():
        batches = learners[way].cutter.whole(groups).batches
        tokens, trained = (sum(len(getattr(one, key)) for one in batches) for key in ("token_ids", "targets"))
        patches = sum(len(one.pixel_values) for one in batches if one.pixel_values is not None)
        yield {
            "model": name,
            "savings": way,
            "tokens": tokens,
            "patches": patches,
            "s": time.median_s,
            "trajectories_per_s": sum(len(group.trajectories) for group in groups) / time.median_s,
            "tflops": cost.training_flops(tokens, trained, patches) / time.median_s / 1e12,
            "peak_mib": grown_on_gpu_mib(calls[way]) if torch.cuda.is_available() else None,
            "speedup": found["none"].median_s / time.median_s,
        }


def learner(model: Any, optimizer: MasterAdamW, changes: dict[str, Any]) -> Learner:
    update = replace(UpdateConfig(max_tokens=MAX_TOKENS, logits_chunk=4096), **changes)
    policy = Policy.build(model, 1.0, (), update.logits_chunk, fused=update.logits == "fused")
    return Learner(policy, None, optimizer, LossConfig(), update, 2 * REPLY_TOKENS)


def made_up(draw: int, model: Any, quick: bool) -> Group:
    """The siblings of one prompt, each with an advantage of its own."""
    sides, count, reply = ((8, 16), 4, 8) if quick else ((LOW_SIDE, HIGH_SIDE), SIBLINGS, REPLY_TOKENS)
    generator = np.random.default_rng(draw)
    low, high = (image(draw, side) for side in sides)
    prompt = generator.integers(0, 1000, TEXT_TOKENS)
    members = []
    for sibling in range(count):
        pieces = [(prompt, False), (np.full(low.visual_tokens, PAD), False), (generator.integers(0, 1000, reply), True)]
        images = [(TEXT_TOKENS, low)]
        if sibling % EVERY == 0:
            images.append((TEXT_TOKENS + low.visual_tokens + reply, high))
            pieces += [(np.full(high.visual_tokens, PAD), False), (prompt[:16], False)]
            pieces.append((generator.integers(0, 1000, reply), True))
        ids = np.concatenate([piece for piece, _ in pieces])
        trainable = np.concatenate([np.full(len(piece), sampled) for piece, sampled in pieces])
        grids = [shown.grid_thw for _, shown in images]
        positions, _ = mrope_positions(ids, grids, image_token_id=PAD)
        logprobs = np.where(trainable, np.float32(-np.log(model.config.text.vocab_size)), np.float32(0))
        spans = tuple(ImageSpan(start, start + shown.visual_tokens, shown) for start, shown in images)
        members.append(Trajectory(ids, positions, trainable, logprobs, spans, 0, (-1.0) ** sibling, {}))
    return Group(draw, draw, 0, tuple(members))


def image(draw: int, side: int) -> ImageInput:
    generator = torch.Generator().manual_seed(1000 * draw + side)
    return ImageInput(f"picture-{draw}-{side}", (1, side, side), torch.randn(side * side, 588, generator=generator))
