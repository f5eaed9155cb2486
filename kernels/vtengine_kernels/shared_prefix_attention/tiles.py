"""Matrix products over tiles of queries: torch on any device, made for the CPU.

A tile is a run of query tokens with the same segments above: part of a long segment, or several short siblings. Its
scores against all its keys lie side by side in one buffer that fits the caches, so one softmax serves them all and
nothing is left to merge. The backward pass computes the weights again instead of keeping them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from vtengine_kernels.shared_prefix_attention.tree import PrefixTree

# Scores of one tile over all heads; tokens per tile. Measured on Zen 3: between 16 and 128 tokens the time varies by
# a tenth as long as the scores stay near a megabyte.
TILE_SCORES = 1 << 18
MIN_ROWS, MAX_ROWS = 16, 128


@dataclass(frozen=True, eq=False)
class Tile:
    """Queries begin..end; keys: token ranges, of which the last ends with the queries themselves; N keys in all.

    hidden: bool [rows, rows], which of the last keys a query does not see.
    """

    begin: int
    end: int
    keys: tuple[tuple[int, int], ...]
    num_keys: int
    hidden: Tensor


def missing() -> str | None:
    return None


def takes(q: Tensor) -> bool:
    return True


def forward(q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Contract: the package's docstring. Nothing but the inputs is kept for the backward pass."""
    tiles = plan(tree, q.shape[1], q.device)
    packed = _Heads(q, k, v, tiles)
    out = torch.empty_like(packed.q)
    for tile in tiles:
        weights = packed.weights(tile)
        _sum_over_keys(out[:, packed.rows(tile)], weights, packed.v, tile)
    return packed.unpack(out, q.dtype), ()


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: tuple[Tensor, ...], tree: PrefixTree
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    tiles = plan(tree, q.shape[1], q.device)
    packed = _Heads(q, k, v, tiles)
    to_out = packed.pack(grad, q.shape[1])
    to_q, to_k, to_v = torch.empty_like(packed.q), torch.zeros_like(packed.k), torch.zeros_like(packed.v)
    buffer = torch.empty_like(packed.buffer)
    for tile in tiles:
        weights = packed.weights(tile)
        rows = packed.rows(tile)
        to_weights = buffer[: weights.numel()].view_as(weights)
        for (begin, end), part in _columns(tile):
            torch.bmm(to_out[:, rows], packed.v[:, begin:end].transpose(1, 2), out=to_weights[:, :, part])
            to_v[:, begin:end].baddbmm_(weights[:, :, part].transpose(1, 2), to_out[:, rows])
        torch.ops.aten._softmax_backward_data.out(to_weights, weights, -1, weights.dtype, grad_input=to_weights)
        _sum_over_keys(to_q[:, rows], to_weights, packed.k, tile)
        for (begin, end), part in _columns(tile):
            to_k[:, begin:end].baddbmm_(to_weights[:, :, part].transpose(1, 2), packed.q[:, rows])
    return (
        packed.unpack(to_q.mul_(packed.scale), q.dtype),
        to_k.transpose(0, 1).to(k.dtype),
        to_v.transpose(0, 1).to(v.dtype),
    )


class _Heads:
    """q, scaled, as [Hkv, T * G, D] with the G query heads of a token side by side; k and v as [Hkv, T, D]."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...]) -> None:
        self.kv_heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.scale = q.shape[2] ** -0.5
        self.q = self.pack(q, q.shape[1]).mul_(self.scale)
        self.k, self.v = self.pack(k, k.shape[1]), self.pack(v, v.shape[1])
        largest = max((tile.end - tile.begin) * tile.num_keys for tile in tiles)
        self.buffer = torch.empty(largest * q.shape[1], dtype=self.dtype, device=q.device)

    def pack(self, x: Tensor, heads: int) -> Tensor:
        """[T, heads, D] -> [Hkv, T * heads / Hkv, D], a copy in the dtype of the work."""
        group = heads // self.kv_heads
        out = torch.empty(self.kv_heads, len(x), group, x.shape[2], dtype=self.dtype, device=x.device)
        out.copy_(x.unflatten(1, (self.kv_heads, group)).permute(1, 0, 2, 3))
        return out.flatten(1, 2)

    def unpack(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[Hkv, T * G, D] -> [T, Hq, D]."""
        return x.unflatten(1, (-1, self.group)).permute(1, 0, 2, 3).flatten(1, 2).to(dtype)

    def rows(self, tile: Tile) -> slice:
        return slice(tile.begin * self.group, tile.end * self.group)

    def weights(self, tile: Tile) -> Tensor:
        """The softmax of a tile's scores, [Hkv, rows * G, N], in the buffer."""
        length = tile.end - tile.begin
        shape = (self.kv_heads, length * self.group, tile.num_keys)
        scores = self.buffer[: shape[0] * shape[1] * shape[2]].view(shape)
        for (begin, end), part in _columns(tile):
            torch.bmm(self.q[:, self.rows(tile)], self.k[:, begin:end].transpose(1, 2), out=scores[:, :, part])
        own = scores.unflatten(1, (length, self.group))[..., tile.num_keys - length :]
        own.masked_fill_(tile.hidden[:, None], float("-inf"))
        torch.ops.aten._softmax.out(scores, -1, False, out=scores)
        return scores


def _columns(tile: Tile) -> list[tuple[tuple[int, int], slice]]:
    """Each range of keys, and where its scores lie."""
    parts, column = [], 0
    for begin, end in tile.keys:
        parts.append(((begin, end), slice(column, column + end - begin)))
        column += end - begin
    return parts


def _sum_over_keys(out: Tensor, weights: Tensor, values: Tensor, tile: Tile) -> None:
    """out [Hkv, rows * G, D] = weights [Hkv, rows * G, N] times the tile's values."""
    for (begin, end), part in _columns(tile):
        out.baddbmm_(weights[:, :, part], values[:, begin:end], beta=0 if part.start == 0 else 1)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def plan(tree: PrefixTree, heads: int, device: torch.device) -> tuple[Tile, ...]:
    """The tiles of a pack. heads: query heads, which share the budget of scores."""
    tiles: list[Tile] = []
    triangle = functools.cache(lambda rows: torch.ones(rows, rows, dtype=torch.bool, device=device).triu_(1))
    segment = 0
    while segment < len(tree.lengths):
        above = tuple((tree.offsets[a], tree.offsets[a + 1]) for a in tree.ancestors[segment])
        seen = sum(end - begin for begin, end in above)
        count = _siblings(tree, segment, seen, heads)
        begin, end = tree.offsets[segment], tree.offsets[segment + count]
        if count > 1:
            owner = torch.repeat_interleave(torch.tensor(tree.lengths[segment : segment + count])).to(device)
            hidden = triangle(end - begin) | (owner[:, None] != owner)
            tiles.append(Tile(begin, end, (*above, (begin, end)), seen + end - begin, hidden))
        first = begin
        while count == 1 and first < end:
            last = min(end, first + _rows(seen + first - begin + MAX_ROWS, heads))
            num_keys = seen + last - begin
            tiles.append(Tile(first, last, (*above, (begin, last)), num_keys, triangle(last - first)))
            first = last
        segment += count
    return tuple(tiles)


def _rows(keys: int, heads: int) -> int:
    return max(MIN_ROWS, min(MAX_ROWS, TILE_SCORES // (heads * keys)))


def _siblings(tree: PrefixTree, segment: int, seen: int, heads: int) -> int:
    """How many segments from this one on share a tile: siblings next to each other without children, while they fit."""
    count, rows = 1, tree.lengths[segment]
    while segment + count < len(tree.lengths) and tree.parents[segment + count] == tree.parents[segment]:
        rows += tree.lengths[segment + count]
        if rows > _rows(seen + rows, heads):
            break
        count += 1
    return count
