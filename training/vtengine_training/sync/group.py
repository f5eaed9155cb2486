"""A process group beside the default one: the trainer (rank 0) and the processes of SGLang."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from vtengine.engine.base import BackendFailed
from vtengine.engine.sglang.transport import ConnectionLost
from vtengine_training.errors import first_line

OPENING = timedelta(seconds=45)
"""Longest time that the others may take to come: they are idle, and have been told."""
TIMEOUT = timedelta(minutes=5)
"""Of a broadcast."""
NCCL_MODE = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
CLEAN_UP_ONLY = "2"
"""After a fault torch's watchdog ends the group. Its default ends the process, for a server that is done without."""


@dataclass(eq=False)
class Group:
    name: str
    handle: Any

    def broadcast(self, tensor: Tensor) -> None:
        """From this process to all others; returns once it is sent. Raises ConnectionLost where one of them is gone."""
        fault = ""
        try:  # without a time NCCL's wait returns at once
            dist.broadcast(tensor, src=0, group=self.handle, async_op=True).wait(TIMEOUT)
        except RuntimeError as error:
            fault = first_line(error)
        if fault:  # outside of the clause: that error knows gloo's sockets, and those that wait at them need their end
            raise ConnectionLost(f"broadcast of weights: {fault}")

    def close(self) -> None:
        """gloo's sockets close with the last reference to its handle, and only then do waiting peers go on."""
        handle = self.handle
        del self.handle  # not None, by which torch means the default group
        dist.destroy_process_group(handle)

    def abort(self) -> None:
        """Ends it whatever it is in the middle of. NCCL can; gloo ends by itself when a peer is gone, or in time."""
        self.handle.abort()
        self.close()


def open_group(name: str, backend: str, address: str, port: int, world_size: int) -> Group:
    """Waits for the other ranks. Raises BackendFailed where they do not come.

    torch has no public call for a group outside of the default group's world; this is how
    SGLang opens its side, and both sides must agree on the store's prefixes.

    The store is opened here, not by torch's `rendezvous`: that takes any address for the one of torchrun's own store.
    """
    fault = ""
    try:
        handle = _open(name, backend, address, port, world_size)
    except RuntimeError as error:
        fault = first_line(error)
    if fault:  # outside of the clause: with the error the store is freed, and those that wait at it can go on
        raise BackendFailed(
            f"the servers did not come to {address}:{port} within {OPENING.seconds} s ({fault}); "
            "can they reach rollout.sync_address?"
        )
    c10d._set_pg_timeout(TIMEOUT, handle)
    return Group(name, handle)


def _open(name: str, backend: str, address: str, port: int, world_size: int) -> Any:
    store = dist.TCPStore(address, port, world_size, is_master=True, timeout=OPENING, multi_tenant=True)
    new_group: Any = c10d._new_process_group_helper
    with _environment(NCCL_MODE, CLEAN_UP_ONLY):  # read as a group is made; that of the ranks keeps its own
        handle, _ = new_group(
            world_size, 0, [], dist.Backend(backend), dist.PrefixStore(name, store), group_name=name, timeout=OPENING
        )
    c10d._world.pg_group_ranks[handle] = {i: i for i in range(world_size)}
    return handle


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
