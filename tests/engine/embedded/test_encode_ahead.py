"""The vision tower beside the passes: who waits, who does not, and what becomes of its work when plans change."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager

import pytest
import torch

from tests.engine.harness import assert_cold, mixed_requests, run, settle
from tests.engine.tiny import image, prompt, request, tiny_model
from vtengine.engine.base import BackendFailed
from vtengine.engine.embedded.encoder import Encoder
from vtengine.engine.embedded.vision_cache import VisionCache
from vtengine.model import hf_tensors


@contextmanager
def tower(engine):
    """Notes the images of each run of the tower in its own thread, which stops before each until `go` is set."""
    go, runs, run_tower = threading.Event(), [], engine.encoder.run_tower

    def watched(images):
        if threading.current_thread().name.startswith("vtengine-tower"):
            runs.append([picture.content_hash for picture in images])
            assert go.wait(30)
        return run_tower(images)

    engine.encoder.run_tower = watched
    try:
        yield go, runs
    finally:
        go.set()


async def somebody_runs(engine, tokens=1000):
    """A request of text alone that goes on for long."""
    task = asyncio.create_task(engine.generate(request("text", prompt(90, 9), max_new_tokens=tokens)))
    while not engine.scheduler.running:
        await asyncio.sleep(0.001)
    return task


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def with_picture(name, seed, **sampling):
    return request(name, prompt(seed, 12, [image(seed)]), [image(seed)], **sampling)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_runs_goes_on_while_the_tower_works_and_answers_are_cold(device):
    model = tiny_model().requires_grad_(False).to(device)
    asks = [with_picture(f"r{k}", k, max_new_tokens=5) for k in range(4)]

    async def beside(engine):
        with tower(engine) as (go, runs):
            text = await somebody_runs(engine)
            tasks = [asyncio.create_task(engine.generate(ask)) for ask in asks]
            await until(lambda: runs)
            steps = engine.stats()["steps"]
            await until(lambda: engine.stats()["steps"] > steps + 20)
            assert not any(task.done() for task in tasks)
            go.set()
            completions = await asyncio.gather(*tasks)
            assert not text.done()
            engine.cancel("text")
            return completions, [name for names in runs for name in names], engine.stats()

    completions, encoded, stats = run(beside, model, encode_ahead=True, max_batch_tokens=512)
    assert sorted(encoded) == [f"image-{k}" for k in range(4)] and stats["images_encoded"] == 4
    for completion, ask in zip(completions, asks, strict=True):
        assert_cold(completion, ask, model)
        assert completion.images_encoded == (True,)


def test_nobody_waits_where_nothing_runs_or_nothing_is_to_be_encoded():
    async def alone_and_again(engine):
        with tower(engine) as (_, runs):
            first = await engine.generate(with_picture("first", 1))
            await somebody_runs(engine)
            again = await engine.generate(with_picture("again", 1))  # its pages are in the tree
            other = await engine.generate(request("other", prompt(5, 12, [image(1)]), [image(1)]))  # its features are
            engine.cancel("text")
            return first, again, other, runs

    first, again, other, runs = run(alone_and_again, encode_ahead=True)
    assert not runs and first.images_encoded == (True,)
    assert again.token_ids == first.token_ids
    assert again.images_encoded == other.images_encoded == (False,)


@pytest.mark.parametrize("resume", [True, False])
def test_siblings_are_encoded_for_once_even_if_they_come_while_the_tower_works(resume):
    async def siblings(engine):
        with tower(engine) as (go, runs):
            await somebody_runs(engine)
            tasks = [asyncio.create_task(engine.generate(with_picture("s0", 1)))]
            await until(lambda: runs)
            tasks += [asyncio.create_task(engine.generate(with_picture(f"s{k}", 1))) for k in (1, 2)]
            await until(lambda: len(engine.scheduler.waiting) == 3)
            steps = engine.stats()["steps"]
            await until(lambda: engine.stats()["steps"] > steps + 3)
            go.set()
            completions = await asyncio.gather(*tasks)
            engine.cancel("text")
            return completions, engine.stats()["images_encoded"]

    completions, encoded = run(siblings, encode_ahead=True, resume=resume)
    assert encoded == (1 if resume else 3)
    assert [c.images_encoded for c in completions] == [(True,), (not resume,), (not resume,)]
    for completion in completions:
        assert_cold(completion, with_picture("s", 1))


def test_the_picture_of_a_second_turn_comes_before_those_of_later_first_turns():
    async def jump(engine):
        engine.encoder.max_patches = 1  # one picture at a time
        with tower(engine) as (go, runs):
            await somebody_runs(engine)
            tasks = [asyncio.create_task(engine.generate(with_picture(f"r{k}", k))) for k in range(4)]
            await until(lambda: len(engine.worker.ahead._begun) == 2)
            tasks.append(asyncio.create_task(engine.generate(with_picture("second turn", 9, began_s=0.0))))
            await until(lambda: len(engine.scheduler.waiting) == 5)
            go.set()
            completions = await asyncio.gather(*tasks)
            engine.cancel("text")
            return completions, [name for names in runs for name in names]

    completions, encoded = run(jump, encode_ahead=True)
    assert encoded == [f"image-{k}" for k in (0, 1, 9, 2, 3)]
    for k, completion in zip((0, 1, 2, 3, 9), completions, strict=True):
        assert_cold(completion, with_picture("r", k))


def test_new_weights_encode_anew_what_waits():
    ask = with_picture("picture", 1)
    weights = hf_tensors(tiny_model(1))

    async def update_while_it_waits(engine):
        with tower(engine) as (go, runs):
            text = await somebody_runs(engine, tokens=200)
            task = asyncio.create_task(engine.generate(ask))
            await until(lambda: runs)
            update = asyncio.create_task(engine.load_weights(weights, version=1))
            await until(lambda: engine.worker.updates)
            go.set()
            await update
            return await text, await task

    old, new = run(update_while_it_waits, model=tiny_model(0), encode_ahead=True)
    assert (old.weight_version, new.weight_version) == (0, 1)
    assert_cold(new, ask, tiny_model(1))


def test_a_tower_that_fails_fails_what_is_there_and_the_engine_goes_on():
    async def fail(engine):
        run_tower = engine.encoder.run_tower

        def broken(images):
            engine.encoder.run_tower = run_tower
            raise RuntimeError("planned")

        text = await somebody_runs(engine)
        engine.encoder.run_tower = broken
        failed = await asyncio.gather(text, engine.generate(with_picture("a", 1)), return_exceptions=True)
        return failed, await engine.generate(with_picture("b", 1))

    failed, after = run(fail, encode_ahead=True)
    assert all(isinstance(error, BackendFailed) and "planned" in str(error) for error in failed)
    assert_cold(after, with_picture("b", 1))


def test_who_leaves_while_the_tower_works_takes_nothing_along():
    async def leave(engine):
        with tower(engine) as (go, runs):
            await somebody_runs(engine)
            tasks = [asyncio.create_task(engine.generate(with_picture(f"r{k}", k))) for k in range(3)]
            await until(lambda: len(runs) == 1 and len(engine.scheduler.waiting) == 3)
            tasks[0].cancel()
            engine.cancel("text")
            go.set()
            rest = await asyncio.gather(*tasks[1:])
            await settle(engine)
            return rest, engine.stats()

    rest, stats = run(leave, encode_ahead=True)
    assert stats["pages_in_use"] == 0
    for k, completion in enumerate(rest, start=1):
        assert_cold(completion, with_picture("r", k))


@pytest.mark.parametrize("budget", [9, 64])
def test_a_crowd_with_several_pictures_each_gets_its_cold_answers(budget):
    asks = mixed_requests(16, max_new_tokens=6)

    async def crowd(engine):
        tasks = []
        for ask in asks:
            tasks.append(asyncio.create_task(engine.generate(ask)))
            await asyncio.sleep(0.002)
        return await asyncio.gather(*tasks)

    for completion, ask in zip(run(crowd, encode_ahead=True, max_batch_tokens=budget), asks, strict=True):
        assert_cold(completion, ask)


def test_on_a_gpu_the_tower_waits_for_its_pixels_and_the_engine_for_the_tower(monkeypatch):
    """Streams that only note what is asked of them: the order is what a GPU depends on."""
    noted = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            noted.append(f"{self.name} waits for {other.name}")

        def synchronize(self):
            noted.append(f"host waits for {self.name}")

    @contextmanager
    def on(stream):
        noted.append(f"begins on {stream.name}")
        yield
        noted.append(f"ends on {stream.name}")

    class Features(torch.Tensor):
        def record_stream(self, stream):
            noted.append(f"{stream.name} reads")

    encoder = Encoder(tiny_model().requires_grad_(False), VisionCache(0), reuse=True)
    run_tower = encoder._run_tower
    monkeypatch.setattr(encoder, "_stream", Stream("tower"))
    monkeypatch.setattr(encoder, "_run_tower", lambda images: [f.as_subclass(Features) for f in run_tower(images)])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream("passes"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    assert len(encoder.run_tower([image(1), image(2)])) == 2
    assert noted == [
        *("tower waits for passes", "begins on tower", "ends on tower"),
        *("passes reads", "passes reads", "host waits for tower"),
    ]


def test_who_waits_for_the_tower_is_not_looked_up_again_in_every_step():
    """With long prompts and many siblings that took longer than the steps themselves."""
    asks = [request(f"r{k}", prompt(1, 12, [image(1)]), [image(1)], max_new_tokens=2) for k in range(6)]

    async def beside(engine):
        with tower(engine) as (go, runs):
            await somebody_runs(engine)
            tasks = [asyncio.create_task(engine.generate(ask)) for ask in asks]
            await until(lambda: runs and engine.stats()["waiting"] == len(asks))
            known, looks = engine.scheduler.known, []
            engine.scheduler.known = lambda sequence: looks.append(sequence) or known(sequence)
            steps = engine.stats()["steps"]
            await until(lambda: engine.stats()["steps"] > steps + 20)
            found = len(looks)
            go.set()
            await asyncio.gather(*tasks)
            engine.cancel("text")
            return found

    assert run(beside, encode_ahead=True) <= len(asks)
