"""New weights: what SGLang is told, in which order, and what happens when it says no. No model, see test_real.py."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vtengine_training.sync.sglang import ByDisk, ByTensor, SglangPublisher

from tests.engine.sglang.backends import over_fake_server
from tests.engine.sglang.fake_server import FakeSglang
from tests.engine.tiny import image, prompt, request, tiny_model
from vtengine.engine.base import BackendFailed
from vtengine.engine.sglang import update as update_module
from vtengine.engine.sglang.buckets import flatten, in_buckets, serialize
from vtengine.model import hf_tensors

ASK = request("a", (1, 2, 3), max_new_tokens=6)
NORM = {"model.norm.weight": torch.ones(64)}
VISION = {"visual.merger.ln_q.weight": torch.ones(32)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(update_module, "FLUSH_PAUSE_S", 0.01)


def serve(function, *faults, offers=(), hooks=(), **options):
    """Runs an async function of (backend, fake server), closes both."""
    fake = FakeSglang(internal_states=[{"vtengine_hooks": list(hooks)}])
    fake.faults, fake.offers = list(faults), fake.offers | set(offers)

    async def main():
        backend = over_fake_server(fake, **options)
        try:
            return await asyncio.wait_for(function(backend, fake), 60)
        finally:
            await backend.close()

    return asyncio.run(main())


def names(fake):
    return [name for name, _ in fake.calls]


def test_vision_weights_need_features_that_do_not_outlive_them():
    async def load(backend, fake):
        with pytest.raises(
            ValueError, match=r"old features.*HOOKS=flush.*SGLANG_VLM_CACHE_SIZE_MB=0.*vision_cache_off"
        ):
            await backend.load_weights(VISION, 1)
        async with backend.updating(2) as update:
            with pytest.raises(ValueError, match="old features"):
                await update.tensors(list(VISION.items()))
        await backend.load_weights(NORM, 3)
        return names(fake), await backend.generate(ASK)

    calls, completion = serve(load)
    assert calls == ["update_weights_from_disk"] and completion.weight_version == 3
    for options in ({"hooks": ["flush", "patchify"]}, {"vision_cache_off": True}):
        serve(lambda backend, fake: backend.load_weights(VISION, 1), **options)


def test_an_update_empties_the_cache_before_and_after():
    async def load(backend, fake):
        await backend.load_weights(NORM, 2)
        return fake.flushes, dict(fake.calls)["update_weights_from_disk"]["flush_cache"], fake.model["weight_version"]

    assert serve(load) == (2, False, "2")


@pytest.mark.parametrize(("version", "name"), [(0, "step-17"), (4, "4")])
def test_an_update_of_nothing_leaves_a_servers_own_name_for_its_weights(version, name):
    """Unless it gives them another number; "step-17" is none and counts as 0."""

    async def load(backend, fake):
        fake.model["weight_version"] = "step-17"
        await backend.load_weights({}, version)
        return fake.flushes, fake.model["weight_version"]

    assert serve(load) == (2, name)


def test_sessions_are_opened_where_the_server_has_them():
    async def load(backend, fake):
        await backend.load_weights(NORM, 2)
        return names(fake)

    offers = ("begin_weight_update", "end_weight_update")
    assert serve(load, offers=offers) == ["begin_weight_update", "update_weights_from_disk", "end_weight_update"]
    with pytest.raises(BackendFailed, match="begin_weight_update: out of memory"):
        serve(load, "begin_weight_update", offers=offers)


def test_an_update_waits_for_running_requests_and_holds_new_ones_back():
    async def load(backend, fake):
        fake.token_s, fake.flush_refusals = 0.02, 3
        before = asyncio.create_task(backend.generate(request("old", (1, 2), max_new_tokens=20)))
        while not fake.requests:
            await asyncio.sleep(0.01)
        update = asyncio.create_task(backend.load_weights(NORM, 5))
        await asyncio.sleep(0.05)
        after = asyncio.create_task(backend.generate(request("new", (1, 2))))
        await update
        assert before.done()
        return (await before).weight_version, (await after).weight_version, len(fake.requests)

    assert serve(load) == (0, 5, 2)


def test_an_update_may_abort_what_runs_and_start_it_again():
    async def load(backend, fake):
        fake.token_s = 0.05
        running = asyncio.create_task(backend.generate(request("old", (1, 2), max_new_tokens=100)))
        while not fake.requests:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await backend.load_weights(NORM, 5)
        fake.token_s = 0.0
        done = await running
        restarts = backend.stats()["requests_restarted"]
        return done.weight_version, done.finish, len(done.token_ids), len(fake.requests), restarts

    assert serve(load, on_update="restart") == (5, "length", 100, 2, 1)


def test_after_an_update_that_failed_midway_nothing_is_answered_until_the_next():
    async def load(backend, fake):
        with pytest.raises(BackendFailed, match="update_weights_from_disk: out of memory"):
            await backend.load_weights(NORM, 5)
        with pytest.raises(BackendFailed, match=r"version 5 failed midway; load the weights again"):
            await backend.generate(ASK)
        await backend.load_weights(NORM, 6)
        return (await backend.generate(ASK)).weight_version

    assert serve(load, "update_weights_from_disk") == 6


def test_released_memory_is_taken_back_by_the_next_update():
    async def load(backend, fake):
        await backend.release_memory(["kv_cache", "weights"])
        await backend.release_memory(["kv_cache", "weights"])
        waiting = asyncio.create_task(backend.generate(ASK))
        await asyncio.sleep(0.05)
        assert not fake.requests and not waiting.done()
        await backend.load_weights(NORM, 1)
        return names(fake), fake.calls[1][1], (await waiting).weight_version

    calls, resumed, version = serve(load)
    assert calls == ["release_memory_occupation", "resume_memory_occupation", "update_weights_from_disk"]
    assert resumed == {"tags": ["kv_cache", "weights"]} and version == 1


def test_the_publisher_sends_every_tensor_once_for_each_version():
    model = tiny_model()
    weights = lambda: iter(hf_tensors(model).items())  # noqa: E731

    async def publish(backend, fake):
        publisher = SglangPublisher(backend, weights, ByTensor(), bucket_bytes=20_000)
        await publisher.publish(1)
        first = len(fake.calls)
        await publisher.publish(1)
        assert len(fake.calls) == first and fake.flushes == 4
        await publisher.publish(2)
        return fake.calls, first, (await backend.generate(ASK)).weight_version

    calls, first, version = serve(publish, vision_cache_off=True)
    assert version == 2 and len(calls) == 2 * first > 4
    assert {name for name, _ in calls} == {"update_weights_from_tensor"}
    assert {body["load_format"] for _, body in calls} == {"flattened_bucket"}


def test_the_publisher_writes_what_the_server_reads(tmp_path):
    model = tiny_model()

    async def publish(backend, fake):
        weights = lambda: iter(hf_tensors(model).items())  # noqa: E731
        await SglangPublisher(backend, weights, ByDisk(tmp_path), bucket_bytes=20_000).publish(4)
        return fake.calls

    ((name, body),) = serve(publish, vision_cache_off=True)
    assert name == "update_weights_from_disk" and body["model_path"].startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model_never_reach_the_server():
    async def publish(backend, fake):
        weights = lambda: iter([("model.norm.weight", torch.ones(3))])  # noqa: E731
        with pytest.raises(ValueError, match=r"model\.norm\.weight \[3\] \(ours: \[64\]\)"):
            await SglangPublisher(backend, weights, ByTensor()).publish(1)
        return fake.calls, (await backend.generate(ASK)).weight_version

    assert serve(publish) == ([], 0)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_buckets_hold_everything_in_order(sizes, limit):
    named = [(str(k), torch.full((size,), k, dtype=torch.uint8)) for k, size in enumerate(sizes)]
    buckets = list(in_buckets(named, limit))
    assert [name for bucket in buckets for name, _ in bucket] == [name for name, _ in named]
    for bucket in buckets:
        assert len(bucket) == 1 or sum(tensor.numel() for _, tensor in bucket) <= limit
    mixed = [("a", torch.ones(3).bfloat16()), ("b", torch.ones(2)), ("c", torch.ones(2))]
    assert [len(bucket) for bucket in in_buckets(mixed, 1000)] == [1, 2]


@pytest.mark.parametrize("to_child", [True, False])
def test_a_bucket_comes_out_as_it_went_in(to_child):
    tensors = [("a", torch.randn(3, 5)), ("b", torch.randn(4)), ("c", torch.randn(6, 2).T)]
    bucket = flatten(tensors)
    back = pickle.loads(serialize(bucket, to_child))  # SGLang reads it with an allow list of modules
    for (name, tensor), place in zip(tensors, back["metadata"], strict=True):
        part = back["flattened_tensor"][place.start_idx : place.end_idx].view(place.dtype).reshape(place.shape)
        assert place.name == name and isinstance(place, SimpleNamespace) and torch.equal(part, tensor)


def test_a_resumed_prompt_is_computed_anew_after_an_update():
    picture = image(1)
    ask = request("a", prompt(1, 20, [picture]), [picture])

    async def load(backend, fake):
        cached = [(await backend.generate(ask)).cached_tokens for _ in range(2)]
        await backend.load_weights({}, 1)
        return [*cached, (await backend.generate(ask)).cached_tokens]

    length = len(ask.token_ids)
    assert serve(load) == [0, length - 1, 0]
