"""Attention over paged keys and values: every row of a packed pass sees its own cached prefix and itself.

Keys and values of all rows are written before any row attends, so a row may read pages that another row of the same
pass fills. Suffixes: T tokens of the pass, N rows, P pages, L padded length, Hq and Hkv heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from vtengine_kernels.kv_store import kv_store
from vtengine_kernels.paged_prefill import available as prefill_available
from vtengine_kernels.paged_prefill import paged_prefill
from vtengine_kernels.prefix_attention import Siblings, available, prefix_attention

from vtengine.engine.embedded.families import Families
from vtengine.engine.embedded.upload import upload
from vtengine.model.attention import PackedCausal

# Rows of one batched call may pad its keys to at most this many times the shortest row.
PADDING_LIMIT = 1.25
# Rows of at most this many tokens are batched; longer ones are efficient alone.
SHORT_ROW_TOKENS = 16


class KVCache:
    """Keys and values of all layers: per layer two tensors [num_pages + 1, page_size, Hkv, D].

    The last page, `spare_page`, belongs to no sequence: rows that only fill up a batch write there. All start as
    zeros: what a masked key holds is multiplied by a weight of 0, which a NaN survives.
    """

    def __init__(
        self, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.page_size = page_size
        self.spare_page = num_pages
        self.shape = (num_pages + 1, page_size, num_kv_heads, head_dim)
        self.keys = [_zeros(self.shape, dtype, device) for _ in range(num_layers)]
        self.values = [_zeros(self.shape, dtype, device) for _ in range(num_layers)]

    def reset(self) -> None:
        """Zeros again. On the CPU by new tensors, which take no time and no memory."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                if tensor.is_cuda:  # captured graphs hold its address
                    tensor.zero_()
                else:
                    tensors[layer] = _zeros(self.shape, tensor.dtype, tensor.device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [T, Hkv, D] to token slots [T] (page * page_size + offset)."""
        kv_store(k, v, self.keys[layer], self.values[layer], slots)


@dataclass(frozen=True)
class RowLayout:
    """Where the rows of a pass lie. All int64 arrays over rows [N]; pages [N, P] holds each row's page table.

    begin: the first token of the row in the packed pass. count: tokens of the row. length: cached prefix + count.
    held: the same page tables as the sequences hold them.
    """

    begin: np.ndarray
    count: np.ndarray
    length: np.ndarray
    pages: np.ndarray
    held: list[list[int]]


class PagedAttention:
    """Each row by the cheapest way there is.

    Rows without a cached prefix: plain causal attention. Single tokens and short rows: the `prefix_attention` kernel,
    which reads pages in place, those of siblings once for all of them. Long rows: `paged_prefill`, in place too, where
    it has a kernel (CUDA). The rest: gathered pages, then scaled_dot_product_attention.
    """

    def __init__(self, cache: KVCache, layout: RowLayout, slots: Tensor, scratch: Scratch, families: Families) -> None:
        self._cache = cache
        self._slots = slots
        self._scratch = scratch
        fresh = np.flatnonzero((layout.length == layout.count) & (layout.count > 1))
        self._fresh = _Fresh.plan(layout, fresh, slots.device) if len(fresh) else None
        cached = (layout.length > layout.count) | (layout.count == 1)
        short = cached & (layout.count <= SHORT_ROW_TOKENS) & available(cache.keys[0])
        self._short = _Short.plan(layout, np.flatnonzero(short), slots.device, families) if short.any() else None
        long = cached & ~short & prefill_available(cache.keys[0])
        self._long = _Long.plan(layout, np.flatnonzero(long), slots.device) if long.any() else None
        groups = _group(layout, np.flatnonzero(cached & ~short & ~long))
        self._batches = [_Batch.plan(layout, rows, cache, slots.device) for rows in groups]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._cache.write(layer, self._slots, k, v)
        if self._fresh is not None and self._fresh.whole:
            return self._fresh.packed.attend(layer, q, k, v)
        if self._short is not None and self._short.whole:
            return self._short.attend(q, self._cache, layer)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if self._fresh is not None:
            rows = self._fresh.tokens
            out[rows] = self._fresh.packed.attend(layer, q[rows], k[rows], v[rows])
        if self._short is not None:
            out[self._short.tokens] = self._short.attend(q[self._short.tokens], self._cache, layer)
        if self._long is not None:
            out[self._long.tokens] = self._long.attend(q[self._long.tokens], self._cache, layer)
        for batch in self._batches:
            keys = self._scratch.gather(0, self._cache.keys[layer], batch.pages)
            values = self._scratch.gather(1, self._cache.values[layer], batch.pages)
            batch.attend(q, keys, values, out)
        return out


class Scratch:
    """Memory for gathered pages, kept between layers and steps: fresh memory costs more than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def gather(self, index: int, cache: Tensor, pages: Tensor) -> Tensor:
        """cache [P, page_size, Hkv, D] at pages [N * p] -> [N * p, page_size, Hkv, D], valid until the next call."""
        wanted = pages.numel() * cache[0].numel()
        buffer = self._buffers.get(index)
        if buffer is None or buffer.numel() < wanted:
            buffer = self._buffers[index] = torch.empty(wanted * 5 // 4, dtype=cache.dtype, device=cache.device)
        out = buffer[:wanted].view(pages.numel(), -1)
        torch.index_select(cache.flatten(1), 0, pages, out=out)
        return out.view(pages.numel(), *cache.shape[1:])


@dataclass(frozen=True)
class _Short:
    """Single tokens [n] of the pass, each with the page table and the number of tokens that it sees."""

    tokens: Tensor
    tables: Tensor
    lengths: Tensor
    siblings: Siblings | None
    whole: bool

    @staticmethod
    def plan(layout: RowLayout, rows: np.ndarray, device: torch.device, families: Families) -> _Short:
        count = layout.count[rows]
        if (count == 1).all():
            row, tokens, lengths = rows, layout.begin[rows], layout.length[rows]
        else:
            row, tokens = np.repeat(rows, count), _tokens(layout, rows)
            lengths = (layout.length - layout.count)[row] + tokens - layout.begin[row] + 1
        siblings = families.of([layout.held[n] for n in row])
        if siblings is not None and device.type == "cuda":
            siblings = siblings.with_work(lengths, device)
        at, tables, seen = upload((tokens, layout.pages[row], lengths), device)
        return _Short(at, tables, seen, siblings, whole=len(tokens) == int(layout.count.sum()))

    def attend(self, q: Tensor, cache: KVCache, layer: int) -> Tensor:
        return prefix_attention(q, cache.keys[layer], cache.values[layer], self.tables, self.lengths, self.siblings)


@dataclass(frozen=True)
class _Long:
    """Rows of many tokens behind a cached prefix: tokens of the pass, and per row what `paged_prefill` takes."""

    tokens: Tensor
    tables: Tensor
    lengths: Tensor
    offsets: Tensor
    longest: int

    @staticmethod
    def plan(layout: RowLayout, rows: np.ndarray, device: torch.device) -> _Long:
        count = layout.count[rows]
        arrays = (_tokens(layout, rows), layout.pages[rows], layout.length[rows], np.cumsum([0, *count]))
        tokens, tables, lengths, offsets = upload(arrays, device)
        return _Long(tokens, tables, lengths, offsets, int(count.max()))

    def attend(self, q: Tensor, cache: KVCache, layer: int) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        return paged_prefill(q, keys, values, self.tables, self.lengths, self.offsets, self.longest)


@dataclass(frozen=True)
class _Fresh:
    """Rows without a cached prefix: plain causal attention among themselves. `whole`: they are the entire pass."""

    packed: PackedCausal
    tokens: Tensor
    whole: bool

    @staticmethod
    def plan(layout: RowLayout, rows: np.ndarray, device: torch.device) -> _Fresh:
        count = layout.count[rows]
        packed = PackedCausal([0, *np.cumsum(count).tolist()])
        tokens = _tokens(layout, rows)
        whole = len(tokens) == int(layout.count.sum())
        return _Fresh(packed, upload([tokens], device)[0], whole)


@dataclass(frozen=True)
class _Batch:
    """Rows of one padded call. tokens [n * c] of the pass, `keep` of them are real; mask [n, 1, c, L] or None."""

    num_rows: int
    max_count: int
    pages: Tensor
    tokens: Tensor
    keep: Tensor | None
    mask: Tensor | None

    @staticmethod
    def plan(layout: RowLayout, rows: np.ndarray, cache: KVCache, device: torch.device) -> _Batch:
        count, length, begin = layout.count[rows], layout.length[rows], layout.begin[rows]
        most, longest = int(count.max()), int(length.max())
        num_pages = -(-longest // cache.page_size)
        steps = np.arange(most)
        real = steps < count[:, None]
        tokens = np.where(real, begin[:, None] + steps, begin[:, None])
        limit = np.where(real, (length - count)[:, None] + steps, 0)  # last visible position of each query
        visible = np.arange(num_pages * cache.page_size) <= limit[:, :, None]
        mask = None if visible.all() else torch.from_numpy(visible).unsqueeze(1).to(device)
        keep = None if real.all() else torch.from_numpy(np.flatnonzero(real)).to(device)
        pages = torch.from_numpy(layout.pages[rows, :num_pages].reshape(-1).astype(np.int64)).to(device)
        return _Batch(len(rows), most, pages, torch.from_numpy(tokens.reshape(-1)).to(device), keep, mask)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        n, c, kv_heads = self.num_rows, self.max_count, keys.shape[2]
        group = q.shape[1] // kv_heads
        k = keys.view(n, -1, kv_heads, keys.shape[3]).transpose(1, 2)
        v = values.view(n, -1, kv_heads, values.shape[3]).transpose(1, 2)
        q_rows = q.index_select(0, self.tokens)
        if c == 1:  # the query heads of a group become the rows of one small matrix
            x = F.scaled_dot_product_attention(q_rows.view(n, kv_heads, group, -1), k, v, attn_mask=self.mask)
            x = x.reshape(n, kv_heads * group, -1)
        else:
            x = q_rows.view(n, c, kv_heads * group, -1).transpose(1, 2)
            x = F.scaled_dot_product_attention(x, k, v, attn_mask=self.mask, enable_gqa=group > 1)
            x = x.transpose(1, 2).flatten(0, 1)
        if self.keep is None:
            out.index_copy_(0, self.tokens, x)
        else:
            out.index_copy_(0, self.tokens[self.keep], x[self.keep])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU each page of memory is taken at its first write (torch's own zeros write all of it)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def _tokens(layout: RowLayout, rows: np.ndarray) -> np.ndarray:
    """Where the tokens of these rows, one row after the other, lie in the pass."""
    count = layout.count[rows]
    return np.repeat(layout.begin[rows] - (np.cumsum(count) - count), count) + np.arange(count.sum())


def _group(layout: RowLayout, rows: np.ndarray) -> list[np.ndarray]:
    """Splits rows into batches: single tokens, short rows and long rows apart, each of similar length."""
    kinds = np.where(layout.count[rows] == 1, 0, np.where(layout.count[rows] <= SHORT_ROW_TOKENS, 1, 2))
    groups: list[np.ndarray] = []
    for kind in range(3):
        members = rows[kinds == kind]
        members = members[np.argsort(layout.length[members], kind="stable")]
        while len(members):
            end = 1
            if kind < 2:
                end = int(np.searchsorted(layout.length[members], layout.length[members[0]] * PADDING_LIMIT, "right"))
                end = max(end, 1)
            groups.append(members[:end])
            members = members[end:]
    return groups


def gather_slots(layout: RowLayout, page_size: int) -> np.ndarray:
    """int64 [T]: the token slot of every token of the pass, rows in order."""
    if (layout.count == 1).all():
        position = layout.length - 1
        return layout.pages[np.arange(len(position)), position // page_size] * page_size + position % page_size
    row = np.repeat(np.arange(len(layout.count)), layout.count)
    position = np.arange(len(row)) - layout.begin[row] + (layout.length - layout.count)[row]
    return layout.pages[row, position // page_size] * page_size + position % page_size
