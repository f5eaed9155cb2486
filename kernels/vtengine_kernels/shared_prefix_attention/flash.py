"""Variable-length flash kernels of torch (CUDA, 16 bits): every segment by itself, then each level of prefixes.

One causal call covers all segments. For each depth of the tree one more call lets all descendants attend to their
prefix as a single block of queries, which reads its keys once; the parts are merged by their log-sum-exp.
Backward, each call gets the merged output and log-sum-exp: the weights it recomputes from them are those of the whole
row, so the merge needs no backward of its own. torch.nn.attention.activate_flash_attention_impl exchanges the kernels
for those of an installed flash-attn.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from vtengine_kernels.shared_prefix_attention.merge import merge_
from vtengine_kernels.shared_prefix_attention.tree import PrefixTree

Place = slice | Tensor
"""Rows of a packed tensor: a range, or int64 indices without repetition."""


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call: which tokens ask, which are asked, where each sequence of either begins (int32 offsets)."""

    queries: Place
    keys: Place
    query_offsets: Tensor
    key_offsets: Tensor
    max_queries: int
    max_keys: int
    causal: bool


def missing() -> str | None:
    """Why these kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than the flash kernels (compute capability 8.0)"
    return None


def takes(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256


def forward(q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Contract: the package's docstring. Keeps the output, its log-sum-exp [Hq, T] and two state tensors."""
    own, *levels = plan(tree, q.device)
    out, lse, state, unused = _ask(own, q, k, v)
    for call in levels:
        part, part_lse, _, _ = _ask(call, q, k, v)
        merge_(out, lse, part, part_lse, call.queries)
    return out, (out, lse, state, unused)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: tuple[Tensor, ...], tree: PrefixTree
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: the sums over the calls."""
    out, lse, state, unused = kept
    own, *levels = plan(tree, q.device)
    total = _answer(own, grad.contiguous(), q, k, v, out, lse, state, unused)
    for call in levels:
        parts = _answer(call, grad, q, k, v, out, lse, state, unused)
        for whole, part, place in zip(total, parts, (call.queries, call.keys, call.keys), strict=True):
            if isinstance(place, slice):
                whole[place] += part
            else:
                whole.index_add_(0, place, part)  # no row twice: nothing races
    return total


def _ask(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return attend(
        q[call.queries], k[call.keys], v[call.keys], call.query_offsets, call.key_offsets,
        call.max_queries, call.max_keys, call.causal,
    )  # fmt: skip


def attend(
    q: Tensor, k: Tensor, v: Tensor, query_offsets: Tensor, key_offsets: Tensor,
    max_queries: int, max_keys: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sequences of any lengths by one kernel; causal: the last query of each sees all its keys.

    q [Tq, Hq, D], k and v [Tk, Hkv, D]; offsets int32 [n + 1] -> the output [Tq, Hq, D], its log-sum-exp [Hq, Tq] and
    two state tensors.
    """
    out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, query_offsets, key_offsets, max_queries, max_keys, 0.0, causal, False, scale=q.shape[2] ** -0.5
    )
    return out, lse, state, unused


def _answer(
    call: Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: Tensor, unused: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys = call.queries, call.keys
    parts: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad[queries], q[queries], k[keys], v[keys], out[queries], lse[:, queries].contiguous(),
        call.query_offsets, call.key_offsets, call.max_queries, call.max_keys, 0.0, call.causal, state, unused,
        scale=q.shape[2] ** -0.5,
    )  # fmt: skip
    return parts


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def plan(tree: PrefixTree, device: torch.device) -> tuple[Call, ...]:
    """The causal call over all segments, then one call per depth at which segments have children."""
    everything = slice(0, tree.num_tokens)
    own = _offsets(tree.lengths, device)
    longest = max(tree.lengths)
    calls = [Call(everything, everything, own, own, longest, longest, True)]
    deepest = max(len(above) for above in tree.ancestors)
    for depth in range(deepest):
        inner = [
            segment
            for segment, above in enumerate(tree.ancestors)
            if len(above) == depth and tree.ends[segment] > tree.offsets[segment + 1]
        ]
        asking = [(tree.offsets[segment + 1], tree.ends[segment]) for segment in inner]
        asked = [(tree.offsets[segment], tree.offsets[segment + 1]) for segment in inner]
        counts = [[end - begin for begin, end in ranges] for ranges in (asking, asked)]
        calls.append(
            Call(
                _place(asking, device),
                _place(asked, device),
                _offsets(counts[0], device),
                _offsets(counts[1], device),
                max(counts[0]),
                max(counts[1]),
                False,
            )
        )
    return tuple(calls)


def _place(ranges: list[tuple[int, int]], device: torch.device) -> Place:
    if len(ranges) == 1:
        return slice(*ranges[0])
    return torch.cat([torch.arange(begin, end) for begin, end in ranges]).to(device)


def _offsets(counts: list[int] | tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [n + 1] cumulative counts."""
    total = torch.tensor([0, *counts]).cumsum(0)
    return total.to(device, torch.int32)
