"""From logits to tokens: bias, temperature, truncation, one random number per token that depends on nothing else.

The random number for the k-th token of a request is a hash of (seed, k): neither the batch nor a preemption changes it.
Suffixes: N rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vtengine.engine.base import SamplingParams

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF
LEAST_TEMPERATURE = 1e-6  # below it logits / temperature leaves float32's range


def uniforms(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """uint64 [N] seeds and counters -> float64 [N] in [0, 1): two rounds of splitmix64."""
    with np.errstate(over="ignore"):
        bits = _mix(_mix(seeds + np.uint64(_GOLDEN)) + counters * np.uint64(_GOLDEN))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seed_bits(seed: int) -> int:
    return seed & _MASK


@dataclass(frozen=True)
class SamplingPlan:
    """The sampling parameters of a batch as tensors; valid as long as the batch has the same requests in it.

    bias: (rows [B], ids [B], values [B]) or None. greedy, plain and truncated partition the rows.
    """

    seeds: np.ndarray
    bias: tuple[Tensor, Tensor, Tensor] | None
    greedy: Tensor
    plain: Tensor
    truncated: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @staticmethod
    def build(
        params: Sequence[SamplingParams], seeds: Sequence[int], banned: Sequence[int], vocab: int, device: torch.device
    ) -> SamplingPlan:
        """banned: ids that no request may ever sample."""
        kinds = [_kind(p) for p in params]

        def floats(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        return SamplingPlan(
            seeds=np.asarray([seed_bits(s) for s in seeds], dtype=np.uint64),
            bias=_bias([p.logit_bias for p in params], banned, device),
            greedy=_rows(kinds, 0, device),
            plain=_rows(kinds, 1, device),
            truncated=_rows(kinds, 2, device),
            temperature=floats([max(p.temperature, LEAST_TEMPERATURE) for p in params]),
            top_k=torch.tensor([p.top_k or vocab for p in params], device=device),
            top_p=floats([p.top_p for p in params]),
            min_p=floats([p.min_p for p in params]),
        )


def _kind(p: SamplingParams) -> int:
    if p.temperature == 0:
        return 0
    return 1 if p.top_p == 1 and p.top_k == 0 and p.min_p == 0 else 2


def _rows(kinds: list[int], kind: int, device: torch.device) -> Tensor:
    return torch.tensor([row for row, k in enumerate(kinds) if k == kind], dtype=torch.int64, device=device)


def _bias(
    biases: Sequence[Mapping[int, float]], banned: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor] | None:
    entries = [(row, token, value) for row, bias in enumerate(biases) for token, value in bias.items()]
    entries += [(row, token, -torch.inf) for row in range(len(biases)) for token in banned]
    if not entries:
        return None
    rows, tokens, values = zip(*entries, strict=True)
    return (
        torch.tensor(rows, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(values, dtype=torch.float32, device=device),
    )


def sample(logits_NV: Tensor, plan: SamplingPlan, counters: np.ndarray) -> tuple[Tensor, Tensor]:
    """logits [N, V], counters uint64 [N]: how many tokens each request has sampled -> ids int64 [N], logprobs [N].

    Greedy rows report the logprob at temperature 1. Works in float32; `logits_NV` may be overwritten.
    """
    logits = logits_NV.float()
    if plan.bias is not None:
        rows, tokens, values = plan.bias
        logits = logits.index_put_((rows, tokens), values, accumulate=True)
    if len(plan.greedy) == len(logits):
        return _greedy(logits)
    draws = torch.from_numpy(uniforms(plan.seeds, counters)).to(logits.device)
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(plan.greedy):
        ids[plan.greedy], logprobs[plan.greedy] = _greedy(logits[plan.greedy])
    for rows, draw in ((plan.plain, _plain), (plan.truncated, _truncated)):
        if len(rows):
            scaled = logits if len(rows) == len(logits) else logits[rows]
            ids[rows], logprobs[rows] = draw(scaled / plan.temperature[rows, None], draws[rows], plan, rows)
    return ids, logprobs


def _greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    best, ids = logits.max(dim=-1)
    return ids, best - logits.logsumexp(dim=-1)


def _plain(logits: Tensor, draws: Tensor, plan: SamplingPlan, rows: Tensor) -> tuple[Tensor, Tensor]:
    del plan, rows
    logprobs = logits.log_softmax(dim=-1)
    ids = _invert(logprobs.exp(), draws)
    return ids, logprobs.gather(1, ids[:, None])[:, 0]


def _truncated(logits: Tensor, draws: Tensor, plan: SamplingPlan, rows: Tensor) -> tuple[Tensor, Tensor]:
    """top-k, then top-p of what is left (at least one id), then min-p relative to the most likely id.

    Drawn in the order of ids, not of ranks: ids of almost equal probability swap ranks from batch to batch.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[1], device=logits.device)
    ordered = ordered.masked_fill(ranks >= plan.top_k[rows, None], -torch.inf)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    drop = (before >= plan.top_p[rows, None]) | (probs < plan.min_p[rows, None] * probs[:, :1])
    drop |= ordered == -torch.inf
    drop[:, 0] = False
    dropped = torch.empty_like(drop).scatter_(1, order, drop)
    return _plain(logits.masked_fill(dropped, -torch.inf), draws, plan, rows)


def _invert(probs: Tensor, draws: Tensor) -> Tensor:
    """The first id whose cumulative probability exceeds the draw; never one of probability 0."""
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    target = draws[:, None].clamp(max=1 - 2.0**-52) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=probs.shape[1] - 1)
