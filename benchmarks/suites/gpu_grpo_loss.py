"""grpo_loss on a GPU: the heads of the 3B and 7B models in bfloat16, every row trained, and 18 % of them.

TFLOP/s counts 6 N H V for N trained rows. The floor is the three matrix products alone, in the same chunks, with the
weight's gradient summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from loss_candidates import Problem, candidates
from memory import grown_on_gpu_mib
from torch import Tensor
from vtengine_kernels.token_logprob.chunked import parts

TESTS = ["-m", "gpu", "tests/kernels/test_grpo_loss_triton.py", "tests/kernels/test_installed_loss.py"]
_COLUMNS = {
    "model": "Head",
    "candidate": "Implementation",
    "rows": "Rows",
    "trained": "Trained",
    "ms": "ms",
    "tflops": "TFLOP/s",
    "floor_ratio": "x floor",
    "vtengine_faster": "vtengine is faster by",
    "peak_mib": "Memory, MiB",
}
TABLES = {"gpu-grpo-loss": {"columns": _COLUMNS}}
HEADS = {"3B": (2048, 151_936), "7B": (3584, 152_064)}
CHUNK = 4096
TAKEN = ("vtengine", "masked rows, head, torch", "Apple CCE", "Liger", "Liger, SM90")


def run(context: Any) -> Iterator[dict[str, Any]]:
    if not torch.cuda.is_available():
        raise RuntimeError("gpu_grpo_loss: torch sees no CUDA device")
    for model, (size, vocabulary) in HEADS.items():
        for count, active in ((4096, 1.0), (8192, 0.18), (16_384, 1.0)):
            if context.quick and (count != 4096 or model != "3B"):
                continue
            yield from measure(context, model, Problem.make(count, size, vocabulary, active, torch.bfloat16, "cuda"))
            torch.cuda.empty_cache()
            torch.compiler.reset()  # a peer compiled for two sizes fails in torch 2.11


def measure(context: Any, model: str, problem: Problem) -> list[dict[str, Any]]:
    trained = int(problem.mask.sum())
    named = {name.removesuffix(" (torch)"): way for name, way in candidates((CHUNK,)).items()}  # Apple's: Triton here
    ways = {name: way for name, way in named.items() if name in TAKEN}
    if trained > 8192:  # torch's float32 scores would not fit, and the others take seconds
        ways = {"vtengine": ways["vtengine"]}
    calls = {name: partial(problem.gradients, way) for name, way in ways.items()}
    timed = {**calls, "three products": partial(floor, problem)}
    times = context.compare(timed, rounds=3, after=torch.cuda.synchronize)  # Liger's own takes half a second each
    flops = 6 * trained * problem.weight.numel()
    return [
        {
            "model": model,
            "candidate": name,
            "rows": problem.mask.numel(),
            "trained": trained,
            "ms": 1e3 * time.min_s,
            "tflops": flops / time.min_s / 1e12,
            "floor_ratio": time.min_s / times["three products"].min_s,
            "vtengine_faster": time.min_s / times["vtengine"].min_s,
            "peak_mib": memory(problem, calls[name]) if name in calls else None,
        }
        for name, time in times.items()
    ]


def memory(problem: Problem, call: Callable[[], object]) -> float:
    problem.hidden.grad = problem.weight.grad = None  # else the last call's make room for this one's
    return grown_on_gpu_mib(call)


def floor(problem: Problem) -> Tensor:
    hidden, weight = problem.hidden.detach()[problem.mask], problem.weight.detach()
    total = torch.zeros(weight.shape, device=weight.device)
    room = torch.empty((min(CHUNK, len(hidden)), len(weight)), dtype=weight.dtype, device=weight.device)
    for part in parts(len(hidden), CHUNK):
        scores = torch.mm(hidden[part], weight.t(), out=room[: part.stop - part.start])
        torch.mm(scores, weight)
        torch.addmm(total, scores.t(), hidden[part], out_dtype=torch.float32, out=total)
    return total
