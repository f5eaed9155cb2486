"""Weights by broadcast to servers that die, freeze or refuse on the way. Each has a scheduler that is a process."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from vtengine_training.sync import group as group_module
from vtengine_training.sync import sglang as sglang_module
from vtengine_training.sync.base import weights_of
from vtengine_training.sync.group import open_group
from vtengine_training.sync.sglang import ByBroadcast, SglangPublisher, free_port

from tests.engine.sglang.backends import TINY
from tests.engine.sglang.fake_server import FakeSglang
from tests.engine.sglang.scheduler import FROZEN, KILLED, WAIT_S, schedulers
from tests.engine.tiny import request, tiny_model
from vtengine.engine.base import BackendFailed
from vtengine.engine.sglang import SglangFleet, SglangHttpBackend, fleet_update
from vtengine.engine.sglang.transport import ConnectionLost
from vtengine.engine.sglang.update import Update
from vtengine.model import hf_tensors

ASK = request("a", (1, 2, 3), max_new_tokens=4)
BUCKET_BYTES = 20_000
"""Several buckets of a tiny model."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits in proportion to what is sent."""
    for name, seconds in (("OPENING", 6), ("TIMEOUT", 3)):
        monkeypatch.setattr(group_module, name, timedelta(seconds=seconds))
    for module in (fleet_update, sglang_module):
        monkeypatch.setattr(module, "GRACE_S", 7.0)


def published(function, *faults, **options):
    """Runs an async function of (publisher, fleet, fake servers) over servers with these faults."""

    async def main(connections):
        fakes = [FakeSglang(internal_states=[{"vtengine_hooks": ["flush"]}]) for _ in connections]
        for fake, connection in zip(fakes, connections, strict=True):
            fake.scheduler = connection
        fleet = SglangFleet([SglangHttpBackend(fake.url, TINY, **options) for fake in fakes], retry_s=60)
        publisher = SglangPublisher(fleet, weights_of(tiny_model(3)), ByBroadcast("gloo"), BUCKET_BYTES)
        try:
            await fleet.check()
            return await asyncio.wait_for(function(publisher, fleet, fakes), 90)
        finally:
            await fleet.close()
            for fake in fakes:
                fake.close()

    with schedulers(len(faults), *faults) as connections:
        return asyncio.run(main(connections))


def has_all(fake):
    """Whether a server has every tensor, and says so."""
    wanted = hf_tensors(tiny_model(3))
    return fake.model["weight_version"] == "1" and all(
        torch.equal(torch.from_numpy(fake.loaded[name]), tensor) for name, tensor in wanted.items()
    )


async def one_version(publisher, fleet, fakes):
    """(which servers have it, version that replies come with)"""
    await publisher.publish(1)
    return [has_all(fake) for fake in fakes], {(await fleet.generate(ASK)).weight_version}


@pytest.mark.parametrize(
    "fault",
    [
        {"init_weights_update_group": (1, KILLED)},
        {"update_weights_from_distributed": (1, KILLED)},
        {"update_weights_from_distributed": (4, KILLED)},
        {"destroy_weights_update_group": (1, KILLED)},
    ],
    ids=["before it is in the group", "first bucket", "fourth bucket", "all is sent"],
)
def test_one_that_dies_is_done_without(fault) -> None:
    """The others get the whole version anew, and only they are asked."""
    assert published(one_version, {}, fault, {}) == ([True, False, True], {1})


def test_all_of_them_get_it() -> None:
    assert published(one_version, {}, {}, {}) == ([True, True, True], {1})


@pytest.mark.parametrize("fault", [{}, {"update_weights_from_distributed": (1, KILLED)}], ids=["close", "abort"])
def test_both_sides_end_the_group_at_the_same_time(fault, monkeypatch) -> None:
    """On one machine NCCL's ends for nobody before all have been told to end it."""
    told = threading.Event()
    close, leave = group_module.Group.close, Update.leave

    async def leaving(self, name):
        told.set()
        await leave(self, name)

    def closing(self):
        assert told.wait(60), "the servers were not asked to leave"
        close(self)

    monkeypatch.setattr(Update, "leave", leaving)
    monkeypatch.setattr(group_module.Group, "close", closing)
    assert published(one_version, {}, fault) == ([True, not fault], {1})


def test_those_that_wait_are_freed_by_the_trainers_end_of_the_group(monkeypatch) -> None:
    """Where its own broadcast fails before anything was sent, they wait at its sockets, whatever is collected when."""
    broadcast, calls = group_module.Group.broadcast, []

    def fails_once(self, tensor):
        calls.append(tensor)
        if len(calls) == 1:
            raise ConnectionLost("broadcast of weights: connection reset by peer")
        broadcast(self, tensor)

    monkeypatch.setattr(group_module.Group, "broadcast", fails_once)
    for module in (fleet_update, sglang_module):
        monkeypatch.setattr(module, "GRACE_S", 0.5)
    gc.disable()
    try:
        begin_s = time.monotonic()
        assert published(one_version, {}, {}) == ([True, True], {1})
        assert time.monotonic() - begin_s < WAIT_S / 4
    finally:
        gc.enable()


def test_a_call_that_never_returns_is_left_behind(monkeypatch) -> None:
    """As NCCL's, whose communicator is made in the first broadcast, where a server has died just before."""
    stuck, released = threading.Event(), threading.Event()

    def sticks(self, tensor):
        stuck.set()
        released.wait()

    async def dies(publisher, fleet, fakes):
        with pytest.raises(BackendFailed, match="none of 1 servers lives"):
            await publisher.publish(1)

    monkeypatch.setattr(group_module.Group, "broadcast", sticks)
    much_later = threading.Timer(60, released.set)
    much_later.start()
    published(dies, {"update_weights_from_distributed": (1, KILLED)})
    assert stuck.is_set() and not released.is_set()
    much_later.cancel()
    released.set()


def test_all_that_die_end_the_run_with_their_names() -> None:
    async def all_die(publisher, fleet, fakes):
        with pytest.raises(BackendFailed, match="none of 2 servers lives"):
            await publisher.publish(1)
        with pytest.raises(BackendFailed, match="none of 2 servers lives"):
            await fleet.generate(ASK)

    dies = {"update_weights_from_distributed": (2, KILLED)}
    published(all_die, dies, dies)


@pytest.mark.slow
def test_one_that_freezes_is_done_without_after_a_while() -> None:
    """First the broadcast runs out of time, then what the server was asked, then the question whether it lives."""

    async def freezes(publisher, fleet, fakes):
        began = time.monotonic()
        found = await one_version(publisher, fleet, fakes)
        return found, time.monotonic() - began

    found, seconds = published(freezes, {}, {"update_weights_from_distributed": (2, FROZEN)}, {}, read_s=5.0)
    assert found == ([True, False, True], {1}) and seconds < 60


def test_a_refusal_in_the_middle_ends_the_run_and_nobody_serves_half_of_it() -> None:
    async def refused(publisher, fleet, fakes):
        fakes[1].always.add("update_weights_from_distributed")
        with pytest.raises(BackendFailed, match="update_weights_from_distributed: out of memory"):
            await publisher.publish(1)
        assert {fake.model["weight_version"] for fake in fakes} == {"default"}
        for server in fleet.servers:
            with pytest.raises(BackendFailed, match="failed midway; load the weights again"):
                await server.generate(ASK)
        fakes[1].always.clear()
        return await one_version(publisher, fleet, fakes)

    assert published(refused, {}, {}, {}) == ([True, True, True], {1})


def test_servers_that_cannot_reach_us_are_not_waited_for() -> None:
    with pytest.raises(BackendFailed, match=r"did not come to 127\.0\.0\.1:\d+ within 6 s.*rollout\.sync_address"):
        open_group("update", "gloo", "127.0.0.1", free_port(), 2)


def test_a_group_that_was_closed_is_not_taken_for_the_default_one() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = open_group("update", "gloo", "127.0.0.1", free_port(), 1)
        group.close()
        for late in (group.close, lambda: group.broadcast(torch.zeros(1))):
            with pytest.raises(AttributeError, match="handle"):
                late()
        assert dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
