"""grpo_loss on the CPU against what people use: the 3B head (H 2048, V 151,936), 512 rows of which 18 % are trained.

Every candidate makes the same loss and both its gradients; `loss_off` and `gradient_off` are relative differences from
full logits of the same numbers in float32. Memory is the most that the process grew during one call, gradients of the
weight included (1.2 GB in float32). Rows of part "full" have every position trained; there the chunk is below all rows.
bfloat16 is measured where the processor multiplies it: elsewhere torch's product takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from loss_candidates import Problem, candidates, from_logprobs, full_logits
from memory import grown_mib
from torch import Tensor
from vtengine_kernels.token_logprob.products import multiplies_bfloat16

TESTS = ["tests/kernels/test_token_logprob.py", "tests/kernels/test_grpo_loss.py"]
_COLUMNS = {
    "candidate": "Implementation",
    "dtype": "dtype",
    "s": "s",
    "cpu_s": "CPU s",
    "vtengine_faster": "vtengine is faster by",
    "peak_mib": "Memory, MiB",
    "loss_off": "Loss off by",
    "gradient_off": "Gradient off by",
}
TABLES = {
    "grpo-loss-masked": {"columns": _COLUMNS, "where": {"part": "masked"}},
    "grpo-loss-full": {"columns": _COLUMNS, "where": {"part": "full"}},
}
OWN = ("masked rows, head, torch", "full logits, torch")
SHAPE = (512, 2048, 151_936)
QUICK_SHAPE = (64, 64, 4_096)


def run(context: Any) -> list[dict[str, Any]]:
    shape = QUICK_SHAPE if context.quick else SHAPE
    everyone = candidates()
    chunked = {name: way for name, way in candidates((1024, shape[0] // 4)).items() if name in OWN or "chunk" in name}
    rows = measure(context, "masked", Problem.make(*shape, 0.18, torch.float32), everyone)
    rows += measure(context, "full", Problem.make(*shape, 1.0, torch.float32), chunked)
    if not multiplies_bfloat16():
        return rows
    narrow = {name: way for name, way in everyone.items() if name in ("vtengine", OWN[0])}
    return rows + measure(context, "masked", Problem.make(*shape, 0.18, torch.bfloat16), narrow)


def measure(
    context: Any, part: str, problem: Problem, ways: dict[str, Callable[[Problem], Tensor]]
) -> list[dict[str, Any]]:
    """One row per candidate, their rounds interleaved."""
    wide = problem.in_float32()
    exact = (float(wide.gradients(partial(from_logprobs, full_logits))), wide.hidden.grad, wide.weight.grad)
    facts = {name: facts_of(problem, way, exact) for name, way in ways.items()}
    del wide, exact  # as large as two weights
    calls = {name: partial(problem.gradients, way) for name, way in ways.items()}
    times = context.compare(calls, rounds=3, warmup=0)
    best = next(iter(times.values())).min_s
    return [
        {
            "part": part,
            "candidate": name,
            "dtype": str(problem.weight.dtype).removeprefix("torch."),
            "rows": problem.mask.numel(),
            "trained": int(problem.mask.sum()),
            "threads": torch.get_num_threads(),
            "s": time.min_s,
            "median_s": time.median_s,
            "cpu_s": time.cpu_s,
            "vtengine_faster": time.min_s / best,
            **facts[name],
        }
        for name, time in times.items()
    ]


def facts_of(problem: Problem, way: Callable[[Problem], Tensor], exact: Any) -> dict[str, Any]:
    """Memory of a call, and how far its numbers are from the exact ones."""
    loss, hidden, weight = exact
    problem.hidden.grad = problem.weight.grad = None  # else the last candidate's make room for this one's
    losses: list[Tensor] = []
    grown = grown_mib(lambda: losses.append(problem.gradients(way)))
    pairs = ((problem.hidden.grad, hidden), (problem.weight.grad, weight))
    off = max(float((ours.float() - true.float()).norm() / true.float().norm()) for ours, true in pairs)
    return {"peak_mib": grown, "loss_off": abs(float(losses[0]) - loss) / abs(loss), "gradient_off": off}
