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
from vtengine_kernels.token_sample import Truncation, token_sample

from vtengine.engine.embedded.upload import upload

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
class Rows:
    """Rows of a batch that are sampled in the same way: index and top_k int64 [n], the others float32 [n].

    kind: 0 greedy, 1 with a temperature only, 2 truncated.
    """

    kind: int
    index: Tensor
    top_k: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True)
class SamplingPlan:
    """The sampling parameters of a batch on the device; valid as long as the batch has the same requests in it.

    bias: (rows [B], ids [B], values [B]) or None. banned: ids that no request may sample, or None. parts: a partition
    of the rows. The seeds uint64 [N] stay on the host.
    """

    seeds: np.ndarray
    device: torch.device
    bias: tuple[Tensor, Tensor, Tensor] | None
    banned: Tensor | None
    parts: tuple[Rows, ...]

    @staticmethod
    def build(
        params: Sequence[SamplingParams], seeds: Sequence[int], banned: Sequence[int], vocab: int, device: torch.device
    ) -> SamplingPlan:
        """banned: ids that no request may ever sample. What goes to the device goes in one copy, see `upload`."""
        kinds = np.array([kind_of(p) for p in params])
        top_k = np.array([min(p.top_k or vocab, vocab) for p in params], dtype=np.int64)
        floats = [(max(p.temperature, LEAST_TEMPERATURE), p.top_p, p.min_p) for p in params]
        numbers = np.array(floats, dtype=np.float32).T
        found = np.unique(kinds).tolist()
        arrays = [np.array(banned, dtype=np.int64), *_bias([p.logit_bias for p in params])]
        for index in (np.flatnonzero(kinds == kind) for kind in found):
            arrays += [index, top_k[index], *numbers[:, index]]
        ids, rows, tokens, values, *sent = upload(arrays, device)
        return SamplingPlan(
            np.asarray([seed_bits(s) for s in seeds], dtype=np.uint64),
            device,
            (rows, tokens, values) if len(rows) else None,
            ids if len(ids) else None,
            tuple(Rows(kind, *sent[5 * n : 5 * n + 5]) for n, kind in enumerate(found)),
        )

    def draws(self, counters: np.ndarray) -> Tensor | None:
        """counters uint64 [N]: how many tokens each request has sampled -> float64 [N] on the device; None: all greedy.

        They do not depend on the pass: sent before it is launched, they do not wait for it.
        """
        if self.parts[-1].kind == 0:  # kinds ascend
            return None
        return upload([uniforms(self.seeds, counters)], self.device)[0]


def kind_of(p: SamplingParams) -> int:
    """See `Rows`."""
    if p.temperature == 0:
        return 0
    return 1 if p.top_p == 1 and p.top_k == 0 and p.min_p == 0 else 2


def _bias(biases: Sequence[Mapping[int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    entries = [(row, token, value) for row, bias in enumerate(biases) for token, value in bias.items()]
    rows, tokens, values = zip(*entries, strict=True) if entries else ((), (), ())
    return np.array(rows, dtype=np.int64), np.array(tokens, dtype=np.int64), np.array(values, dtype=np.float32)


def sample(logits: Tensor, plan: SamplingPlan, draws: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits float32 [N, V], draws float64 [N] of the plan -> ids int64 [N], logprobs float32 [N].

    Greedy rows report the logprob at temperature 1. `logits` are overwritten.
    """
    if plan.bias is not None:
        rows_B, ids_B, values_B = plan.bias
        logits.index_put_((rows_B, ids_B), values_B, accumulate=True)
    if plan.banned is not None:
        logits.index_fill_(1, plan.banned, -torch.inf)
    if len(plan.parts) == 1:
        return _WAYS[plan.parts[0].kind](logits, draws, plan.parts[0])
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    assert draws is not None
    for rows in plan.parts:
        index = rows.index
        ids[index], logprobs[index] = _WAYS[rows.kind](logits[index], draws[index], rows)
    return ids, logprobs


def _greedy(logits: Tensor, draws: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
    del draws, rows
    return token_sample(logits)


def _plain(logits: Tensor, draws: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
    return token_sample(logits, draws, rows.temperature)


def _truncated(logits: Tensor, draws: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
    return token_sample(logits, draws, rows.temperature, Truncation(rows.top_k, rows.top_p, rows.min_p))


_WAYS = (_greedy, _plain, _truncated)
