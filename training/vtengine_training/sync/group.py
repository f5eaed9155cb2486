"""A process group beside the default one: the trainer (rank 0) and the processes of SGLang."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, eq=False)
class Group:
    name: str
    handle: Any

    def broadcast(self, tensor: Tensor) -> None:
        """From this process to all others; returns once it is sent."""
        dist.broadcast(tensor, src=0, group=self.handle)

    def close(self) -> None:
        dist.destroy_process_group(self.handle)


def open_group(name: str, backend: str, address: str, port: int, world_size: int) -> Group:
    """Waits for the other ranks. torch has no public call for a group outside of the default group's world; this is how
    SGLang opens its side, and both sides must agree on the store's prefixes.

    The store is opened here, not by torch's `rendezvous`: that takes any address for the one of torchrun's own store.
    """
    store = dist.TCPStore(address, port, world_size, is_master=True, timeout=TIMEOUT, multi_tenant=True)
    new_group: Any = c10d._new_process_group_helper
    handle, _ = new_group(
        world_size, 0, [], dist.Backend(backend), dist.PrefixStore(name, store), group_name=name, timeout=TIMEOUT
    )
    c10d._world.pg_group_ranks[handle] = {i: i for i in range(world_size)}
    return Group(name, handle)
