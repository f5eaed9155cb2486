"""The group of trainer and servers beside torchrun's own."""

from __future__ import annotations

import subprocess
import sys

import torch
from vtengine_training.sync.group import open_group
from vtengine_training.sync.sglang import free_port

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


def test_it_opens_under_torchrun(monkeypatch):
    """There, torch's rendezvous takes every address for that of a store that runs already, and waits for it."""
    port = free_port()
    command = [sys.executable, "-c", SERVERS_SIDE, f"tcp://127.0.0.1:{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        group = open_group("update", "gloo", "127.0.0.1", port, 2)
        group.broadcast(torch.tensor([1.0, 2.0, 3.0]))
        assert other.communicate(timeout=60)[0].strip() == "[1.0, 2.0, 3.0]"
        group.close()
