"""Ways to one loss: from hidden states and a head to DAPO's loss (clip 0.2 / 0.28, k3 0.04) and its two gradients.

Peers take part where they are installed (`make bench-peers`; "Liger, SM90" wants Hopper and liger-kernel[cutedsl]). All
but Liger and ours give log-probabilities, and share the few lines that turn those into the loss.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from vtengine_kernels.grpo_loss import Head, Objective, Tokens, grpo_loss
from vtengine_kernels.grpo_loss.ref import policy_terms
from vtengine_kernels.token_logprob import Impl, liger, token_logprob

OBJECTIVE = Objective("clip", 0.2, 0.28, kl_coef=0.04)
Logprobs = Callable[["Problem"], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """hidden [B, T, H] and weight [V, H] want gradients; mask bool [B, T]; tokens of the B * T positions."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    mask: Tensor
    tokens: Tokens

    @staticmethod
    def make(rows: int, size: int, vocabulary: int, active: float, dtype: torch.dtype, device: str = "cpu") -> Problem:
        """Four sequences; two spans of each are generated, as in a two-turn episode, `active` of it all."""
        generator = torch.Generator(device).manual_seed(0)
        length = rows // 4
        hidden = torch.randn(4, length, size, generator=generator, device=device)
        weight = torch.empty(vocabulary, size, device=device)
        weight.normal_(0.0, size**-0.5, generator=generator)
        targets = torch.randint(vocabulary, (4, length), generator=generator, device=device)
        mask = torch.zeros(4, length, dtype=torch.bool, device=device)
        span = max(1, round(active * length / 2))
        mask[:, length // 4 : length // 4 + span] = True
        mask[:, length - span :] = True
        if active >= 1:
            mask[:] = True
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        logprobs, _ = token_logprob(hidden.view(rows, size), Head(weight), targets.view(-1), mask=mask.view(-1))
        tokens = _tokens_near(logprobs, mask.view(-1), length, generator)
        return Problem(hidden.requires_grad_(), weight.requires_grad_(), targets, mask, tokens)

    def in_float32(self) -> Problem:
        """The same numbers, wider."""
        hidden, weight = (x.detach().float().requires_grad_() for x in (self.hidden, self.weight))
        return replace(self, hidden=hidden, weight=weight)

    def gradients(self, loss: Callable[[Problem], Tensor]) -> Tensor:
        """Forward and backward; the gradients stay in hidden.grad and weight.grad. Returns the loss."""
        self.hidden.grad = self.weight.grad = None
        total = loss(self)
        total.backward()
        return total.detach()


def _tokens_near(logprobs: Tensor, mask: Tensor, length: int, generator: torch.Generator) -> Tokens:
    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, device=mask.device)

    old, ref = (logprobs + 0.1 * normal(len(mask)) for _ in range(2))
    advantages = normal(len(mask) // length).repeat_interleave(length)
    return Tokens(advantages, mask / mask.sum(), old, ref=ref)


def candidates(chunks: tuple[int, ...] = (1024,)) -> dict[str, Callable[[Problem], Tensor]]:
    """By name; ours first, with each of these chunks."""
    ways: dict[str, Callable[[Problem], Tensor]] = {
        "vtengine" if len(chunks) == 1 else f"vtengine, chunk {chunk}": partial(ours, chunk=chunk) for chunk in chunks
    }
    ways["masked rows, head, torch"] = partial(from_logprobs, masked_rows)
    ways["full logits, torch"] = partial(from_logprobs, full_logits)
    for name, logprobs in (("Apple CCE (torch)", cce()), ("TRL", trl()), ("verl", verl())):
        if logprobs is not None:
            ways[name] = partial(from_logprobs, logprobs)
    if importlib.util.find_spec("liger_kernel") is not None:
        ways["Liger"] = liger_grpo
    if liger.missing() is None:
        ways["Liger, SM90"] = partial(ours, chunk=chunks[0], impl="liger")
    return ways


def ours(problem: Problem, chunk: int, impl: Impl = "auto") -> Tensor:
    flat, targets, mask = problem.hidden.flatten(0, 1), problem.targets.view(-1), problem.mask.view(-1)
    head = Head(problem.weight)
    return grpo_loss(flat, head, targets, problem.tokens, OBJECTIVE, mask=mask, chunk=chunk, impl=impl).total


def from_logprobs(logprobs: Logprobs, problem: Problem) -> Tensor:
    """logprobs: of all positions, or of those that the mask keeps."""
    found, tokens = logprobs(problem).view(-1), problem.tokens
    if len(found) != problem.mask.numel():
        tokens = tokens.pick(problem.mask.view(-1))
    difference = tokens.ref - found
    terms = policy_terms(found, tokens, OBJECTIVE) + OBJECTIVE.kl_coef * (difference.exp() - difference - 1)
    # a masked position may hold any finite number; its weight is 0
    return (terms * tokens.weights).sum()


def masked_rows(problem: Problem) -> Tensor:
    logits = (problem.hidden[problem.mask] @ problem.weight.t()).float()
    return logits.log_softmax(-1).gather(1, problem.targets[problem.mask][:, None])[:, 0]


def full_logits(problem: Problem) -> Tensor:
    logits = (problem.hidden @ problem.weight.t()).float()
    return logits.log_softmax(-1).gather(2, problem.targets[..., None])[..., 0]


def cce() -> Logprobs | None:
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return None
    linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def logprobs(problem: Problem) -> Tensor:
        targets = problem.targets.masked_fill(~problem.mask, -100)
        impl = "cce" if problem.hidden.is_cuda else "torch_compile"
        return -linear_cross_entropy(problem.hidden, problem.weight, targets, reduction="none", impl=impl).float()

    return logprobs


def trl() -> Logprobs | None:
    if importlib.util.find_spec("trl") is None:
        return None
    selective_log_softmax = importlib.import_module("trl.trainer.utils").selective_log_softmax
    return lambda problem: selective_log_softmax(problem.hidden @ problem.weight.t(), problem.targets).float()


def verl() -> Logprobs | None:
    """Its file alone: importing the package wants ray and a dozen others."""
    package = importlib.util.find_spec("verl")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / "utils" / "experimental" / "torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    fused = module.FusedLinearForPPO()

    def logprobs(problem: Problem) -> Tensor:
        return fused(problem.hidden, problem.weight, problem.targets)[0].float()

    return logprobs


def liger_grpo(problem: Problem) -> Tensor:
    """Its options as TRL sets them for DAPO, but for compilation: it is of the arithmetic on N logprobs alone."""
    module = importlib.import_module("liger_kernel.chunked_loss")
    made = module.LigerFusedLinearGRPOLoss(
        beta=OBJECTIVE.kl_coef, epsilon_low=0.2, epsilon_high=0.28, loss_type="dapo", compiled=False
    )
    shape, tokens = problem.mask.shape, problem.tokens
    found = made(
        problem.hidden,
        problem.weight,
        problem.targets,
        problem.mask,
        tokens.advantages.view(shape)[:, 0],
        ref_per_token_logps=tokens.ref.view(shape),
        old_per_token_logps=tokens.old.view(shape),
    )
    total: Tensor = found[0] if isinstance(found, tuple) else found
    return total
