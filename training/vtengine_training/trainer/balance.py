"""Which rank learns from which group, so that none waits long for another one; and the way there."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from safetensors.torch import load, save

from vtengine_training.trainer.batch import packed_lengths
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.trajectory import Group, pack_groups, unpack_groups

JSON_NAME = "groups"
Load = tuple[int, int]
"""(packed tokens of a group, rank that has it)."""


def balanced(
    groups: Sequence[Group], minibatches: Sequence[Collection[int]], ranks: Ranks, share_prefix: bool
) -> list[Group]:
    """The groups that this rank is to learn from, out of those of all ranks, in the order of their draws.

    A meeting. minibatches: the draws of each. Within each, ranks get as equally many packed tokens as `place` finds.
    """
    if ranks.is_alone:
        return list(groups)
    own = [(group.draw, sum(packed_lengths(group.trajectories, share_prefix))) for group in groups]
    loads = {draw: (tokens, rank) for rank, part in enumerate(ranks.gather(own)) for draw, tokens in part}
    places: dict[int, int] = {}
    for draws in minibatches:
        places |= place({draw: loads[draw] for draw in draws}, ranks.size)
    kept = [group for group in groups if places[group.draw] == ranks.rank]
    if any(places[draw] != owner for draw, (_, owner) in loads.items()):
        leaving: list[list[Group]] = [[] for _ in range(ranks.size)]
        for group in groups:
            if places[group.draw] != ranks.rank:
                leaving[places[group.draw]].append(group)
        for parcel in ranks.exchange([_pack(part) for part in leaving]):
            kept += _unpack(parcel)
    return sorted(kept, key=lambda group: group.draw)


def place(loads: Mapping[int, Load], size: int) -> dict[int, int]:
    """The rank of each draw, the same wherever it is computed: the longest first, to whoever has least so far.

    Nothing moves where that would not take from the rank with most.
    """
    before, after, found = [0] * size, [0] * size, {}
    for draw, (tokens, owner) in sorted(loads.items(), key=lambda item: (-item[1][0], item[0])):
        rank = min(range(size), key=lambda one: (after[one], one != owner, one))
        before[owner] += tokens
        after[rank] += tokens
        found[draw] = rank
    return found if max(after) < max(before) else {draw: owner for draw, (_, owner) in loads.items()}


def _pack(groups: Sequence[Group]) -> bytes:
    if not groups:
        return b""
    tensors, described = pack_groups(groups)
    text = np.frombuffer(json.dumps(described).encode(), dtype=np.uint8).copy()
    return save({**tensors, JSON_NAME: torch.from_numpy(text)})


def _unpack(parcel: bytes) -> list[Group]:
    if not parcel:
        return []
    tensors = load(parcel)
    return unpack_groups(tensors, json.loads(tensors.pop(JSON_NAME).numpy().tobytes()))
