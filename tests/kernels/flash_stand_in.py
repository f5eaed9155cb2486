"""The contract of torch's variable-length flash operators, computed in plain torch: what they return, on any device."""

from __future__ import annotations

import itertools

import torch
from vtengine_kernels.shared_prefix_attention import flash


def stand_in(monkeypatch):
    """flash.forward and flash.backward then call these functions, and say that they can run here."""
    monkeypatch.setattr(flash, "missing", lambda: None)
    monkeypatch.setattr(flash, "takes", lambda q: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward, raising=False)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward, raising=False)


def _sequences(query_offsets, key_offsets):
    pairs = zip(query_offsets.tolist(), key_offsets.tolist(), strict=True)
    for (q0, k0), (q1, k1) in itertools.pairwise(pairs):
        yield slice(q0, q1), slice(k0, k1)


def _scores(q, k, scale, causal):
    """[H, Lq, Lk] of one sequence."""
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    if causal:
        assert len(q) == len(k)
        scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), float("-inf"))
    return scores


def forward(q, k, v, query_offsets, key_offsets, max_q, max_k, dropout, causal, debug, *, scale):
    assert query_offsets.dtype == key_offsets.dtype == torch.int32 and dropout == 0 and not debug
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], len(q))
    for at, keys in _sequences(query_offsets, key_offsets):
        assert at.stop - at.start <= max_q and keys.stop - keys.start <= max_k
        scores = _scores(q[at], k[keys], scale, causal)
        values = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[at] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        lse[:, at] = scores.logsumexp(-1).float()
    return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)


def backward(
    grad, q, k, v, out, lse, query_offsets, key_offsets, max_q, max_k, dropout, causal, state, unused, *, scale
):
    """Weights from the given log-sum-exp, their gradient from the given output: as the kernels do it."""
    to_q, to_k, to_v = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    shared = (grad * out).sum(-1).t()[:, :, None]  # [H, T, 1]
    for at, keys in _sequences(query_offsets, key_offsets):
        weights = (_scores(q[at], k[keys], scale, causal) - lse[:, at, None]).exp()
        to_weights = torch.einsum("qhd,khd->hqk", grad[at], v[keys].repeat_interleave(group, 1))
        to_scores = weights * (to_weights - shared[:, at]) * scale
        to_q[at] = torch.einsum("hqk,khd->qhd", to_scores, k[keys].repeat_interleave(group, 1))
        for into, part, source in ((to_k, to_scores, q), (to_v, weights, grad)):
            whole = torch.einsum("hqk,qhd->khd", part, source[at])
            into[keys] = whole.unflatten(1, (-1, group)).sum(2)
    return to_q, to_k, to_v
