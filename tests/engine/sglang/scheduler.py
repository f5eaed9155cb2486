"""What of SGLang takes part in a broadcast of weights: one rank of the update group, a process that can be killed."""

from __future__ import annotations

import math
import os
import signal
from contextlib import contextmanager
from multiprocessing import get_context

WAIT_S = 120.0


@contextmanager
def schedulers(count, *faults):
    """`count` connections to processes, each (call, body) -> (ok, message, tensors); killed at the end.

    faults: for some of the processes {call: (number of the call that it strikes, signal)}; {} = none.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "tests.engine.sglang.scheduler"])
    here, processes = [], []
    for number in range(count):
        ours, theirs = context.Pipe()
        fault = faults[number] if number < len(faults) else {}
        processes.append(context.Process(target=serve, args=(theirs, fault), daemon=True))
        processes[-1].start()
        theirs.close()
        here.append(ours)
    try:
        for connection in here:  # the first of them waits for torch's import, which is no part of a broadcast
            connection.recv()
        yield here
    finally:
        for process in processes:
            process.kill()
            process.join()


def serve(connection, fault):
    """Says that it is there, then answers. A fault strikes when the call has come, before anything is done."""
    groups, counts = {}, dict.fromkeys(fault, 0)
    connection.send("there")
    while True:
        try:
            call, body = connection.recv()
        except EOFError:
            return
        if call in counts:
            counts[call] += 1
            if counts[call] == fault[call][0]:
                os.kill(os.getpid(), fault[call][1])
        try:
            connection.send((True, "ok", CALLS[call](groups, body) or {}))
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}", {}))


def enter(groups, body):
    """As SGLang does (`init_custom_process_group`)."""
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    name, size, timeout = body["group_name"], body["world_size"], timedelta(seconds=WAIT_S)
    rank = body["rank_offset"]
    place = f"tcp://{body['master_address']}:{body['master_port']}"
    store, rank, size = next(c10d.rendezvous(place, rank, size, timeout=timeout))
    group, _ = c10d._new_process_group_helper(
        size, rank, [], dist.Backend(body["backend"]), dist.PrefixStore(name, store), group_name=name, timeout=timeout
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    groups[name] = group


def receive(groups, body):
    """{name: tensor} out of one flat tensor."""
    import torch
    import torch.distributed as dist

    dtypes = [getattr(torch, name) for name in body["dtypes"]]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(body["shapes"], dtypes, strict=True)]
    flat = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.broadcast(flat, src=0, group=groups[body["group_name"]])
    parts = zip(body["names"], body["shapes"], dtypes, flat.split(sizes), strict=True)
    return {name: part.clone().view(dtype).view(shape).numpy() for name, shape, dtype, part in parts}


def leave(groups, body):
    import torch.distributed as dist

    dist.destroy_process_group(groups.pop(body["group_name"]))


CALLS = {
    "init_weights_update_group": enter,
    "update_weights_from_distributed": receive,
    "destroy_weights_update_group": leave,
}
KILLED, FROZEN = signal.SIGKILL, signal.SIGSTOP
