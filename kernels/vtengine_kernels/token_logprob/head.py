"""The output head: hidden states -> scores of every id of the vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BANNED = -1e30
"""Score of an id that is never sampled: probability exactly 0, and no NaN in the entropy, as -inf would give."""

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True, eq=False)
class LowRank:
    """An addition to the weight: scale * b @ a, with a [R, H] and b [V, R] (LoRA on the head)."""

    a: Tensor
    b: Tensor
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Head:
    """score = cap(hidden @ (weight + scale * b @ a).T) / temperature, with cap(x) = soft_cap * tanh(x / soft_cap).

    weight [V, H]: a head of its own or the embedding (tied). banned: int64 ids whose probability is 0.
    """

    weight: Tensor
    temperature: float = 1.0
    soft_cap: float | None = None
    banned: Tensor | None = None
    low_rank: LowRank | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What may want a gradient: weight, a, b."""
        return self.weight, *((None, None) if self.low_rank is None else (self.low_rank.a, self.low_rank.b))


def check(hidden: Tensor, head: Head, targets: Tensor, mask: Tensor | None, chunk: int) -> None:
    """ValueError, naming what does not fit, before anything runs."""
    weight = head.weight
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or not weight.numel():
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)}: must be [N, H] and [V, H], H and V at least 1"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise ValueError(f"hidden {hidden.dtype}, weight {weight.dtype}: must be equal, and one of {_names(DTYPES)}")
    rows = len(hidden)
    if targets.dtype != torch.int64 or targets.shape != (rows,):
        raise ValueError(f"targets {targets.dtype} {list(targets.shape)}: must be int64 [{rows}]")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (rows,)):
        raise ValueError(f"mask {mask.dtype} {list(mask.shape)}: must be bool [{rows}]")
    if head.banned is not None and (head.banned.dtype != torch.int64 or head.banned.ndim != 1):
        raise ValueError(f"banned {head.banned.dtype} {list(head.banned.shape)}: must be int64 [B]")
    if not (head.temperature > 0 and math.isfinite(head.temperature)):
        raise ValueError(f"temperature = {head.temperature}: must be positive")
    if head.soft_cap is not None and not (head.soft_cap > 0 and math.isfinite(head.soft_cap)):
        raise ValueError(f"soft_cap = {head.soft_cap}: must be positive, or None for no cap")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: must be at least 1")
    _check_low_rank(head)
    _check_devices(hidden=hidden, weight=weight, targets=targets, mask=mask, banned=head.banned)
    check_ids("targets", targets if mask is None else targets[mask], len(weight))
    check_ids("banned", head.banned, len(weight))


def check_ids(name: str, ids: Tensor | None, bound: int) -> None:
    """ValueError: an id outside 0 .. bound - 1."""
    if ids is None or not len(ids):
        return
    low, high = torch.stack(torch.aminmax(ids)).tolist()  # one copy: a GPU is waited for
    if low < 0 or high >= bound:
        raise ValueError(f"{name} hold {low if low < 0 else high}: must be from 0 to {bound - 1}")


def _check_low_rank(head: Head) -> None:
    if head.low_rank is None:
        return
    a, b = head.low_rank.a, head.low_rank.b
    vocabulary, size = head.weight.shape
    if a.ndim != 2 or a.shape[1] != size or b.shape != (vocabulary, len(a)):
        raise ValueError(
            f"low_rank a {list(a.shape)}, b {list(b.shape)}: must be [R, {size}] and [{vocabulary}, R] for this weight"
        )
    if not math.isfinite(head.low_rank.scale):  # some BLAS libraries take a scale of NaN for 0
        raise ValueError(f"low_rank scale = {head.low_rank.scale}: must be finite")
    if a.dtype not in DTYPES or b.dtype not in DTYPES:
        raise ValueError(f"low_rank a {a.dtype}, b {b.dtype}: must be one of {_names(DTYPES)}")
    _check_devices(weight=head.weight, a=a, b=b)


def _check_devices(**tensors: Tensor | None) -> None:
    found = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(found.values())) > 1:
        raise ValueError(f"{', '.join(f'{name} on {device}' for name, device in found.items())}: must be on one device")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
