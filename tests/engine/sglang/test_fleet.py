"""Several servers as one backend: who gets what, and what happens when one is lost. No model, see test_real.py."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest
import torch

from tests.engine.sglang.backends import TINY
from tests.engine.sglang.fake_server import REPLY, FakeSglang
from tests.engine.tiny import PAD, image, prompt, request
from vtengine.engine.base import BackendFailed, RequestRejected
from vtengine.engine.routing import routing_key
from vtengine.engine.sglang import SglangFleet, SglangHttpBackend, addresses, connect_servers
from vtengine.engine.sglang import backend as backend_module
from vtengine.engine.sglang.transport import ServerUnsuitable


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(backend_module, "RETRY_PAUSE_S", 0.01)


def serve(function, count=3):
    """Runs an async function of (fleet, fake servers), closes all."""

    async def main():
        fakes = [FakeSglang() for _ in range(count)]
        fleet = SglangFleet([SglangHttpBackend(fake.url, TINY) for fake in fakes], retry_s=0.05)
        try:
            return await asyncio.wait_for(function(fleet, fakes), 60)
        finally:
            await fleet.close()
            for fake in fakes:
                fake.close()

    return asyncio.run(main())


def ask(seed, name="", **sampling):
    """A prompt of its own with an image of its own."""
    picture = image(seed)
    return request(name or f"r{seed}", prompt(seed, 12, [picture]), [picture], **sampling)


def rids(fakes):
    return [len(fake.requests) for fake in fakes]


def test_siblings_and_turns_of_a_prompt_go_to_one_server_and_prompts_are_spread():
    low, high = image(1), image(2, h=6, w=8)

    async def play(fleet, fakes):
        ids = prompt(1, 20, [low])
        asks = [request(f"s{k}", ids, [low], temperature=1.0, seed=k) for k in range(6)]
        first, *_ = await asyncio.gather(*(fleet.generate(one) for one in asks))
        ids = [*ids, *first.token_ids, 253, *[PAD] * high.visual_tokens, 254]
        second = await fleet.generate(request("turn-2", ids, [low, high]))
        together = rids(fakes)
        await asyncio.gather(*(fleet.generate(ask(seed)) for seed in range(10, 50)))
        return second.cached_tokens, len(first.token_ids), together, rids(fakes)

    cached, new, together, all_of_them = serve(play)
    assert sorted(together) == [0, 0, 7] and cached == 20 + low.visual_tokens + 2 + new
    assert min(all_of_them) >= 4


def test_the_key_is_that_of_the_beginning():
    one, other = image(1), image(2)
    ids = prompt(1, 20, [one])
    key = routing_key(request("a", ids, [one]), PAD)
    assert key == routing_key(request("b", [*ids, 1, 253, *[PAD] * 6, 254], [one, other]), PAD)
    assert key != routing_key(request("a", ids, [other]), PAD)
    assert key != routing_key(request("a", [9, *ids[1:]], [one]), PAD)
    assert routing_key(request("a", (1, 2)), PAD) != routing_key(request("a", (1, 3)), PAD)


def test_one_dies_in_the_middle_and_nothing_is_lost_or_done_twice():
    async def play(fleet, fakes):
        for fake in fakes:
            fake.token_s = 0.01
        tasks = [asyncio.create_task(fleet.generate(ask(seed, max_new_tokens=20))) for seed in range(60)]
        while not fakes[0].requests:
            await asyncio.sleep(0.005)
        fakes[0].always.add("dead")
        return await asyncio.gather(*tasks), fleet.stats()

    done, stats = serve(play)
    assert Counter(completion.request_id for completion in done) == Counter(f"r{seed}" for seed in range(60))
    assert all(completion.token_ids == REPLY[:20] for completion in done)
    assert stats["failovers"] >= 1 and stats["servers_down"] == 1 and stats["requests"] == 60


def test_a_server_that_comes_back_gets_its_prompts_again():
    async def play(fleet, fakes):
        await fleet.generate(ask(1))
        (home,) = [fake for fake in fakes if fake.requests]
        home.always.add("dead")
        await fleet.generate(ask(1))
        assert fleet.stats()["servers_down"] == 1
        home.always.clear()
        while fleet.stats()["servers_down"]:
            await asyncio.sleep(0.02)
        before = len(home.requests)
        await fleet.generate(ask(1))
        return len(home.requests) - before

    assert serve(play) == 1


def test_a_server_that_comes_back_with_old_weights_waits_for_the_next_update():
    async def play(fleet, fakes):
        await fleet.check()
        await fleet.load_weights({}, 1)
        home = fakes[0]
        home.always.add("dead")
        await asyncio.gather(*(fleet.generate(ask(seed)) for seed in range(20)))
        await fleet.load_weights({"model.norm.weight": torch.ones(64)}, 2)
        home.model["weight_version"] = "default"
        home.always.clear()
        while not fleet._stale:
            await asyncio.sleep(0.02)
        assert fleet.stats()["servers_down"] == 1
        async with fleet.updating(3):
            pass
        assert home.model["weight_version"] == "3"
        done = await asyncio.gather(*(fleet.generate(ask(seed)) for seed in range(20)))
        return {completion.weight_version for completion in done}, fleet.stats()["servers_down"]

    assert serve(play) == ({3}, 0)


def test_a_full_queue_moves_a_request_but_leaves_the_server_in():
    async def play(fleet, fakes):
        for fake in fakes[:2]:
            fake.always.add("queue_full")
        done = await asyncio.gather(*(fleet.generate(ask(seed)) for seed in range(8)))
        return len(done), fleet.stats()["servers_down"], len({sent["rid"] for sent in fakes[2].requests})

    assert serve(play) == (8, 0, 8)


def test_all_are_lost():
    async def play(fleet, fakes):
        await fleet.check()
        for fake in fakes:
            fake.always.add("dead")
        with pytest.raises(BackendFailed):
            await fleet.generate(ask(1))
        with pytest.raises(BackendFailed, match="none of 3 servers lives"):
            await fleet.generate(ask(2))

    serve(play)


def test_a_stream_moves_only_before_its_first_chunk():
    async def play(fleet, fakes):
        for fake in fakes:
            fake.faults = ["dies_later"] if fake is fakes[0] else []
        ends = []
        for seed in range(12):
            chunks = []
            try:
                await fleet.generate(ask(seed, max_new_tokens=5), chunks.append)
                ends.append(sum(chunks, ()) == REPLY[:5])
            except BackendFailed:
                ends.append("lost")
        return Counter(ends)

    assert serve(play) == {True: 11, "lost": 1}


def test_one_that_does_not_answer_is_done_without_and_one_of_another_kind_is_refused():
    async def absent(fleet, fakes):
        fakes[1].always.add("dead")
        await fleet.check()
        return fleet.stats()["servers_down"]

    async def wrong(fleet, fakes):
        fakes[1].info["version"] = "0.4.0"
        with pytest.raises(ServerUnsuitable, match=r"SGLang 0\.4\.0"):
            await fleet.check()

    assert serve(absent) == 1
    serve(wrong)


def test_what_is_wrong_with_the_request_is_not_tried_elsewhere():
    async def play(fleet, fakes):
        fakes[0].faults, fakes[1].faults, fakes[2].faults = ["refused"], ["refused"], ["refused"]
        with pytest.raises(RequestRejected, match="cannot load image"):
            await fleet.generate(ask(1))
        return sum(rids(fakes))

    assert serve(play) == 1


def test_a_router_stands_for_its_healthy_workers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.config.to_json()))
    router = FakeSglang()
    workers = [("http://a:1/", True), ("http://b:1", True), ("http://c:1", False), ("grpc://d:1", True)]
    try:
        assert isinstance(connect_servers(router.url, tmp_path), SglangHttpBackend)
        router.workers = [{"url": url, "is_healthy": healthy} for url, healthy in workers]
        fleet = connect_servers(router.url, tmp_path, max_chunks_per_s=100)
        assert [server.where for server in fleet.servers] == ["http://a:1", "http://b:1"]
        assert [server.max_chunks_per_s for server in fleet.servers] == [50, 50]
        router.workers = router.workers[2:]
        with pytest.raises(ValueError, match=r"without a healthy worker that speaks HTTP \(2 listed\)"):
            connect_servers(router.url, tmp_path)
    finally:
        router.close()


def test_addresses():
    assert addresses("http://a:1, https://b:2/") == ["http://a:1", "https://b:2"]
    for bad in ("", ",", "http://a,ftp://b", "http://a,http://a/"):
        with pytest.raises(ValueError, match="backend "):
            addresses(bad)
    with pytest.raises(ValueError, match="every address once"):
        SglangFleet([SglangHttpBackend("http://a:1", TINY), SglangHttpBackend("http://a:1", TINY)])
