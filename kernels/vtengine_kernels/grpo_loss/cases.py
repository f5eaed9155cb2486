"""Objectives that the tests and the benchmark run, and tokens to run them on."""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine_kernels.grpo_loss.objective import Objective, Tokens

OBJECTIVES = {
    "clip": Objective(),
    "clip higher, dual": Objective(clip_low=0.2, clip_high=0.28, dual_clip=1.3),
    "clip, k1, entropy": Objective(kl="k1", kl_coef=0.1, entropy_coef=0.05),
    "clip, k2": Objective(kl="k2", kl_coef=0.1),
    "clip, k3, correction": Objective(kl="k3", kl_coef=0.1, importance_cap=1.1),
    "sequence-clip": Objective("sequence-clip", clip_low=0.05, clip_high=0.06),
    "sequence-clip, everything": Objective(
        "sequence-clip", 0.1, 0.1, dual_clip=1.05, kl_coef=0.1, entropy_coef=0.05, importance_cap=1.2
    ),
    "clipped-weight": Objective("clipped-weight", 1.0, 0.28),
    "clipped-weight, k3, entropy": Objective("clipped-weight", 0.1, 0.1, kl_coef=0.02, entropy_coef=-0.01),
    "reinforce, correction": Objective("reinforce", importance_cap=1.1),
}


def make_tokens(logprobs: Tensor, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tokens:
    """Tokens near these logprobs [N], in sequences of five; weights add up to 1."""
    count = len(logprobs)
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(count, generator=generator)

    weights = torch.rand(count, generator=generator)
    base = logprobs.detach().float().cpu()
    values = {
        "advantages": normal(),
        "weights": weights / weights.sum().clamp_min(1e-9),
        "old": base + 0.3 * normal(),
        "rollout": base + 0.3 * normal(),
        "ref": base + 0.3 * normal(),
    }
    sequences = torch.arange(count) // 5
    return Tokens(
        **{name: x.to(dtype) for name, x in values.items()}, sequences=sequences, num_sequences=count // 5 + 2
    )
