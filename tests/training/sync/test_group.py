"""The group of trainer and servers beside torchrun's own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from vtengine_training.sync.group import TIMEOUT, Group, open_group
from vtengine_training.sync.sglang import free_port

from vtengine.engine.sglang.transport import ConnectionLost

SERVERS_SIDE = """
import sys, torch, torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
store, rank, size = next(c10d.rendezvous(sys.argv[1], 1, 2))
group, _ = c10d._new_process_group_helper(
    size, rank, [], dist.Backend("gloo"), dist.PrefixStore("update", store), group_name="update",
    timeout=c10d.default_pg_timeout)
c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
got = torch.zeros(3)
dist.broadcast(got, src=0, group=group)
print(got.tolist())
"""
"""As SGLang enters one."""


@pytest.fixture
def modes(monkeypatch):
    """What the environment said of faults in NCCL, each time that a group was made."""
    seen, new_group = [], c10d._new_process_group_helper

    def watched(*arguments, **options):
        seen.append(os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING"))
        return new_group(*arguments, **options)

    monkeypatch.setattr(c10d, "_new_process_group_helper", watched)
    return seen


@pytest.mark.parametrize("own", [None, "1"])
def test_it_opens_under_torchrun(monkeypatch, modes, own):
    """There, torch's rendezvous takes every address for that of a store that runs already, and waits for it.

    A lost server must not end the trainer; the mode of other groups is the user's.
    """
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    if own:
        monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", own)
    port = free_port()
    command = [sys.executable, "-c", SERVERS_SIDE, f"tcp://127.0.0.1:{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        group = open_group("update", "gloo", "127.0.0.1", port, 2)
        group.broadcast(torch.tensor([1.0, 2.0, 3.0]))
        assert other.communicate(timeout=60)[0].strip() == "[1.0, 2.0, 3.0]"
        group.close()
    assert modes == ["2"] and os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == own


def test_a_broadcast_waits_for_its_end(monkeypatch):
    """NCCL's work is only queued when the call comes back, and reports a fault where it is waited for with a time."""
    waited = []

    class Work:
        def wait(self, timeout):
            waited.append(timeout)
            raise RuntimeError("ncclRemoteError\nmore")

    monkeypatch.setattr(dist, "broadcast", lambda tensor, src, group, async_op: Work() if async_op else None)
    with pytest.raises(ConnectionLost, match=r"broadcast of weights: ncclRemoteError$"):
        Group("update", None).broadcast(torch.zeros(1))
    assert waited == [TIMEOUT]
