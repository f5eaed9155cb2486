"""Attention behind one call: the model calls `attend`; what is cached, paged or packed is the context's affair."""

from __future__ import annotations

import functools
import importlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from vtengine_kernels.shared_prefix_attention import PrefixTree, flash, shared_prefix_attention

# Sequences padded to a common length in one batch may waste at most this share of its slots.
PADDING_LIMIT = 0.25


class AttentionContext(Protocol):
    """What a forward pass needs to know about the sequences it runs over."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] of this pass's tokens -> [T, Hq, D].

        Rotary embedding is already applied; Hq is a multiple of Hkv. The scale is 1 / sqrt(D). The last dimension is
        contiguous; rows and heads may be strided views of a larger tensor.
        """
        ...


@dataclass(frozen=True)
class Runs:
    """A packed dimension as runs of equally long sequences: ((length, count), ...), in order."""

    items: tuple[tuple[int, int], ...]

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(length for length, count in self.items for _ in range(count))

    @functools.cached_property
    def max_length(self) -> int:
        return max((length for length, _ in self.items), default=0)

    @property
    def total(self) -> int:
        return sum(length * count for length, count in self.items)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, runs: Runs, causal: bool = False) -> Tensor:
    """Attention inside each sequence of a packed [T, H, D] layout; every run of equal lengths is one batched call.

    q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]. T = runs.total.
    """
    varlen = _varlen(q)
    if varlen is not None:
        offsets = _offsets(runs.lengths, q.device, _current_stream(q.device))
        return varlen(q, k, v, offsets, runs.max_length, causal)
    outputs, begin = [], 0
    for length, count in runs.items:
        end = begin + length * count
        batch = [x[begin:end].unflatten(0, (count, length)) for x in (q, k, v)]
        outputs.append(batched_attention(batch[0], batch[1], batch[2], causal).flatten(0, 1))
        begin = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def batched_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q [B, L, Hq, D], k and v [B, L, Hkv, D] -> [B, L, Hq, D], by torch's scaled_dot_product_attention."""
    heads = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    is_causal, enable_gqa = causal and q.shape[1] > 1, q.shape[2] != k.shape[2]
    if getattr(_thread, "plain", False):
        plain = torch.ops.aten._scaled_dot_product_attention_math
        return plain(*heads, is_causal=is_causal, enable_gqa=enable_gqa)[0].transpose(1, 2)  # type: ignore[no-any-return]
    out = F.scaled_dot_product_attention(*heads, is_causal=is_causal, enable_gqa=enable_gqa)
    return out.transpose(1, 2)


_thread = threading.local()


@contextmanager
def plain_attention() -> Iterator[None]:
    """While inside, `batched_attention` of this thread is products and a softmax, with gradients by autograd: what
    torch's `sdpa_kernel(SDPBackend.MATH)` chooses for all threads, those of an engine that generates meanwhile too."""
    before = getattr(_thread, "plain", False)
    _thread.plain = True
    try:
        yield
    finally:
        _thread.plain = before


class PackedCausal:
    """Causal attention over sequences laid end to end, without a cache: training, scoring, parity.

    cu_seqlens: [n + 1] ascending token offsets, from 0 to T (as a sequence or a tensor).
    Equal lengths are one batched call; different ones are sorted into batches of similar length and padded at the end,
    where causality hides the padding without a mask.
    """

    def __init__(self, cu_seqlens: Sequence[int] | Tensor) -> None:
        offsets = [int(x) for x in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)]
        if len(offsets) < 2 or offsets[0] != 0 or any(b <= a for a, b in itertools.pairwise(offsets)):
            raise ValueError(f"cu_seqlens = {offsets}: must be ascending token offsets that start at 0, at least two")
        self.offsets = offsets
        lengths = [b - a for a, b in itertools.pairwise(offsets)]
        self.runs = Runs(tuple((length, 1) for length in lengths))
        self.equal = Runs(((lengths[0], len(lengths)),)) if len(set(lengths)) == 1 else None
        self._plans: dict[torch.device, _Padded] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(q) != self.offsets[-1]:
            raise ValueError(f"{len(q)} tokens, but cu_seqlens ends at {self.offsets[-1]}")
        if self.equal is not None:
            return dense_attention(q, k, v, self.equal, causal=True)
        if _varlen(q) is not None:
            return dense_attention(q, k, v, self.runs, causal=True)
        plan = self._plans.get(q.device)
        if plan is None:
            plan = self._plans[q.device] = _Padded.plan(self.offsets, q.device)
        return plan.attend(q, k, v)


@dataclass(frozen=True)
class PackedTree:
    """Causal attention over packed sequences that share their beginnings, each beginning held once: training on groups.

    A token's q, k and v must be those of its place in the sequences, not in the pack.
    """

    tree: PrefixTree

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return shared_prefix_attention(q, k, v, self.tree)


@dataclass(frozen=True)
class _Padded:
    """Batches of sequences of similar length: row indices [B, L] per batch, and where each token's output then lies."""

    batches: tuple[Tensor, ...]
    restore: Tensor

    @staticmethod
    @torch.inference_mode(False)
    def plan(offsets: Sequence[int], device: torch.device) -> _Padded:
        spans = sorted(((b - a, a) for a, b in itertools.pairwise(offsets)), reverse=True)
        groups: list[list[tuple[int, int]]] = []
        tokens = 0
        for length, begin in spans:
            if groups and (tokens + length) >= (1 - PADDING_LIMIT) * groups[-1][0][0] * (len(groups[-1]) + 1):
                groups[-1].append((length, begin))
                tokens += length
            else:
                groups.append([(length, begin)])
                tokens = length
        batches, restore, slot = [], torch.empty(offsets[-1], dtype=torch.long), 0
        for group in groups:
            longest = group[0][0]
            rows = torch.empty(len(group), longest, dtype=torch.long)
            for row, (length, begin) in enumerate(group):
                rows[row] = torch.arange(begin, begin + longest).clamp_(max=begin + length - 1)
                restore[begin : begin + length] = torch.arange(slot, slot + length)
                slot += longest
            batches.append(rows.to(device))
        return _Padded(tuple(batches), restore.to(device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for rows in self.batches:
            batch = [x.index_select(0, rows.view(-1)).unflatten(0, rows.shape) for x in (q, k, v)]
            outputs.append(batched_attention(batch[0], batch[1], batch[2], causal=True).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.restore)


_Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]


def _varlen(q: Tensor) -> _Varlen | None:
    """A variable-length flash kernel for these tensors: flash-attn's, else torch's own; None: CUDA and 16 bits only."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    return _flash_attn() or (_torchs_flash if flash.takes(q) and flash.missing() is None else None)


@functools.cache
def _flash_attn() -> _Varlen | None:
    try:
        function: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError):
        return None

    def call(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, causal: bool) -> Tensor:
        out: Tensor = function(q, k, v, offsets, offsets, longest, longest, causal=causal)
        return out

    return call


def _torchs_flash(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, causal: bool) -> Tensor:
    """Any lengths by one kernel. On Hopper scaled_dot_product_attention prefers cuDNN (torch 2.11 and newer), which
    spends tens of milliseconds on a plan for every shape that it has not seen, so on nearly every prompt and image."""
    return flash.attend(q, k, v, offsets, offsets, longest, longest, causal)[0]


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _offsets(lengths: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """int32 [n + 1] cumulative lengths. From pinned memory, or the host would wait for what runs on the GPU.

    stream: the current one. No other waits for the copy, nor before the memory is used again once this is forgotten.
    """
    offsets = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    return offsets.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else offsets
