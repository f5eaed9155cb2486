"""What happens to requests besides being answered: rejection, cancellation, weight updates, failures, storms."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.engine.harness import MODEL, TOLERANCE, assert_cold, mixed_requests, run, serve, settle
from tests.engine.tiny import PAD, VOCAB, Letters, image, prompt, request, tiny_model
from vtengine.engine.base import BackendFailed, RequestRejected
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig, PoolTooSmall
from vtengine.model import ModelLoadError, hf_tensors, save_model

OVERLAP = pytest.mark.parametrize("overlap", [False, True])


def test_cancel_by_id_returns_what_there_is_and_keeps_its_pages():
    ids = prompt(1, 20)

    async def cancel_midway(engine):
        chunks = []

        def on_tokens(token_ids):
            chunks.append(token_ids)
            if len(chunks) == 5:
                engine.cancel("c")
                engine.cancel("unknown")

        cancelled = await engine.generate(request("c", ids, max_new_tokens=8000), on_tokens)
        assert sum(map(tuple, chunks), ()) == cancelled.token_ids
        return cancelled, await engine.generate(request("again", ids))

    cancelled, again = run(cancel_midway, num_pages=3000)
    assert cancelled.finish == "cancelled" and 5 <= len(cancelled.token_ids) < 8000
    assert again.cached_tokens == 16
    assert cancelled.token_ids[:5] == again.token_ids[:5]


def test_tokens_share_chunks_where_they_come_faster_than_chunks_may():
    async def chunks_of(engine):
        async def collect(name):
            chunks = []
            completion = await engine.generate(request(name, prompt(1, 20), max_new_tokens=40), chunks.append)
            return completion, chunks

        return await asyncio.gather(*map(collect, "abc"))

    for rate, most in ((1e-3, 3), (1e9, 40)):  # a burst of three streams may begin between two steps
        for completion, chunks in run(chunks_of, max_chunks_per_s=rate):
            ids = sum(map(tuple, chunks), ())
            assert ids == completion.token_ids and len(ids) == 40
            assert len(chunks[0]) == 1 and 2 <= len(chunks) <= most
            assert rate < 1 or len(chunks) == 40
    with pytest.raises(ValueError, match="max_chunks_per_s = 0"):
        EngineConfig(max_chunks_per_s=0)


def test_cancelled_tasks_free_their_pages():
    async def cancel_all(engine):
        tasks = [asyncio.create_task(engine.generate(a)) for a in mixed_requests(12, max_new_tokens=200)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await settle(engine)
        return engine.stats()

    assert run(cancel_all)["pages_in_use"] == 0


def test_requests_that_can_never_fit_are_rejected_with_the_figures():
    async def reject(engine):
        with pytest.raises(
            RequestRejected, match=r"30 prompt tokens \+ max_new_tokens 12 need 11 pages.*has 10"
        ) as error:
            await engine.generate(request("big", prompt(1, 30)))
        assert (error.value.code, error.value.blame) == ("request_too_large", "request")
        return await engine.generate(request("fits", prompt(1, 29)))

    assert len(run(reject, num_pages=10).token_ids) == 12


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (request("a", (1, 256)), "token_out_of_range"),
        (request("a", (1, -1)), "token_out_of_range"),
        (request("a", (1,), stop=("",)), "invalid_sampling"),
        (request("a", (1,), logit_bias={999: 1.0}), "invalid_sampling"),
        (request("a", (1,), logit_bias={1: float("nan")}), "invalid_sampling"),
        (request("a", (1,), logit_bias={1: 1e39}), "invalid_sampling"),
        (request("a", (1,), logit_bias=dict.fromkeys(range(VOCAB), float("-inf"))), "invalid_sampling"),
        (request("a", (PAD, 1, *[PAD] * 5), [image(1)]), "image_tokens_mismatch"),
        (request("a", (1, *[PAD] * 6), [image(1, width=500)]), "image_shape"),
    ],
)
def test_malformed_requests_are_rejected(ask, code):
    async def reject(engine):
        with pytest.raises(RequestRejected) as error:
            await engine.generate(ask)
        return error.value.code, error.value.blame

    assert run(reject) == (code, "setup")


def test_a_request_id_is_served_once_at_a_time():
    async def twice(engine):
        return await asyncio.gather(
            *(engine.generate(request("same", (1, 2))) for _ in range(2)), return_exceptions=True
        )

    first, second = run(twice)
    assert len(first.token_ids) == 12 and (second.code, second.blame) == ("duplicate_request", "setup")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_finite_fail_the_request_and_leave_nothing_behind(temperature):
    """Weights of a training that diverged: finite themselves, their products are not."""
    model = tiny_model(0)
    name = "model.layers.0.mlp.down_proj.weight"
    good = hf_tensors(model)[name].clone()
    ask = [request("r0", prompt(1, 20), temperature=temperature), request("r1", prompt(1, 20))]

    async def diverge(engine):
        await engine.load_weights({name: torch.full_like(good, 1e38)}, version=1)
        with pytest.raises(BackendFailed, match=r"r0: the model's scores are not finite.*float32"):
            await engine.generate(ask[0])
        await engine.load_weights({name: good}, version=2)
        return await engine.generate(ask[1])

    assert_cold(run(diverge, model=model), ask[1], tiny_model(0))


def test_new_vision_weights_alone_change_the_answer_and_drop_both_caches():
    picture, model, other = image(1), tiny_model(0), tiny_model(1)
    ask = [request(f"r{k}", prompt(1, 20, [picture]), [picture]) for k in range(2)]
    vision = {name: tensor for name, tensor in hf_tensors(other).items() if name.startswith("visual.")}

    async def update(engine):
        old = await engine.generate(ask[0])
        await engine.load_weights(vision, version=3)
        assert engine.stats()["pages_cached"] == 0 and engine.stats()["vision_cache_bytes"] == 0
        return old, await engine.generate(ask[1])

    old, new = run(update, model=model)
    assert_cold(old, ask[0])
    assert (old.weight_version, new.weight_version) == (0, 3)
    assert new.cached_tokens == 0 and new.images_encoded == (True,)
    assert new.token_ids != old.token_ids
    assert_cold(new, ask[1], model)


def test_weights_come_from_a_checkpoint_folder_too(tmp_path):
    save_model(tiny_model(1), tmp_path)

    async def update(engine):
        await engine.load_weights(tmp_path, version=2)
        with pytest.raises(ModelLoadError, match="not a folder"):
            await engine.load_weights(tmp_path / "none", version=3)
        return await engine.generate(request("a", prompt(1, 9)))

    completion = run(update, model=tiny_model(0))
    assert completion.weight_version == 2
    assert_cold(completion, request("a", prompt(1, 9)), tiny_model(1))


@OVERLAP
def test_an_update_waits_for_what_runs_and_holds_back_what_waits(overlap):
    async def update_midway(engine):
        asks = [request(f"r{k}", prompt(k, 10), max_new_tokens=30) for k in range(4)]
        tasks = [asyncio.create_task(engine.generate(a)) for a in asks]
        while not engine.scheduler.running:
            await asyncio.sleep(0.001)
        await engine.load_weights(hf_tensors(tiny_model(1)), version=1)
        return asks, await asyncio.gather(*tasks)

    asks, completions = run(update_midway, model=tiny_model(0), max_running=2, max_batch_tokens=16, overlap=overlap)
    versions = [c.weight_version for c in completions]
    assert versions == sorted(versions) and versions[0] == 0 and versions[-1] == 1
    for ask, completion in zip(asks, completions, strict=True):
        assert_cold(completion, ask, tiny_model(completion.weight_version))


def test_weights_that_do_not_fit_change_nothing():
    async def bad_update(engine):
        before = await engine.generate(request("a", prompt(1, 9)))
        with pytest.raises(ModelLoadError, match="misshapen"):
            await engine.load_weights({"model.norm.weight": torch.ones(3)}, version=9)
        return before, await engine.generate(request("b", prompt(1, 9)))

    before, after = run(bad_update)
    assert after.token_ids == before.token_ids
    assert after.weight_version == 0 and after.cached_tokens == 8


@OVERLAP
def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(overlap):
    model = tiny_model()
    decode, engines, broken = model.decode, [], []

    def decode_once_broken(*args):
        if not broken and engines and len(engines[0].scheduler.running) == 3:  # all are in, however slow the machine
            broken.append(True)
            raise RuntimeError("planned")
        return decode(*args)

    model.decode = decode_once_broken

    async def fail(engine):
        engines.append(engine)
        failed = await asyncio.gather(
            *map(engine.generate, mixed_requests(3, max_new_tokens=300)), return_exceptions=True
        )
        ask = mixed_requests(1)[0]
        return failed, await engine.generate(ask), ask

    failed, after, ask = run(fail, model=model, overlap=overlap)
    assert all(isinstance(error, BackendFailed) and "planned" in str(error) for error in failed)
    assert_cold(after, ask)


@OVERLAP
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("together", [True, False])
def test_an_image_that_the_gpu_has_no_room_for_fails_those_who_show_it_and_no_others(together, ahead, overlap):
    """In one step with others: some share the beginning of its prompt, some are in the middle of their answers."""
    small, large = image(1), image(2, h=12, w=12)
    text = prompt(5, 20)
    asks = [request(f"t{k}", prompt(k, 9), max_new_tokens=60) for k in range(3)]
    asks += [request("s", (*text, *prompt(6, 9, [small])), [small]), request("beginning", (*text, 1, 2))]
    bad = [request(f"b{k}", (*text, *prompt(7, 9, [large]), k), [large]) for k in range(2)]
    model = tiny_model()
    visual = model.visual.forward

    def out_of_memory(pixels, grids):
        if len(pixels) >= 144 or (len(grids) > 1 and not together):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return visual(pixels, grids)

    model.visual.forward = out_of_memory

    async def serve_all(engine):
        tasks = [asyncio.create_task(engine.generate(a)) for a in asks[:3]]
        while engine.stats()["generated_tokens"] < 9:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(engine.generate(a)) for a in (bad[0], *asks[3:], bad[1])]
        return await asyncio.gather(*tasks, return_exceptions=True), engine.stats()

    results, stats = run(serve_all, model=model, encode_ahead=ahead, overlap=overlap)
    failed = [result for result in results if isinstance(result, BackendFailed)]
    assert len(failed) == 2
    assert all("an image of 144 patches does not fit" in str(error) for error in failed)
    for ask, result in zip(asks, [r for r in results if not isinstance(r, BackendFailed)], strict=True):
        assert_cold(result, ask)
    assert stats["running"] == stats["waiting"] == stats["pages_in_use"] == 0 < stats["preemptions"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_whose_device_is_lost():
    """After an illegal access on a GPU every further call fails, that which empties the caches too."""

    async def lose():
        engine = EmbeddedEngine(tiny_model(), Letters(), EngineConfig(page_size=4, num_pages=300))

        def lost(*_):
            raise RuntimeError("the device is lost")

        engine.model.decode = engine.runner.cache.reset = lost
        asks = (engine.generate(request(name, prompt(1, 9))) for name in "ab")
        errors = await asyncio.wait_for(asyncio.gather(*asks, return_exceptions=True), 30)
        with pytest.raises(BackendFailed, match="closed"):
            await engine.generate(request("c", (1,)))
        with pytest.raises(BackendFailed, match="closed"):
            await engine.load_weights({}, 1)
        await engine.close()
        return errors

    first, second = asyncio.run(lose())
    assert isinstance(first, BackendFailed) and "the device is lost" in str(first)
    assert isinstance(second, BackendFailed)  # or it came too late


def test_closing_fails_what_is_left_and_refuses_more():
    async def close_midway():
        engine = EmbeddedEngine(MODEL, Letters(), EngineConfig(page_size=4, num_pages=3000))
        task = asyncio.create_task(engine.generate(request("a", prompt(1, 9), max_new_tokens=8000)))
        await asyncio.sleep(0.01)
        await engine.close()
        errors = await asyncio.gather(task, return_exceptions=True)
        with pytest.raises(BackendFailed, match="closed"):
            await engine.generate(request("b", (1,)))
        return errors[0]

    assert isinstance(asyncio.run(close_midway()), BackendFailed)


@pytest.mark.parametrize(
    ("field", "value"), [("page_size", 0), ("num_pages", 0), ("max_batch_tokens", 4), ("num_threads", 0)]
)
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"engine.{field} = {value}"):
        EngineConfig(**{field: value})


def test_a_gpu_gets_larger_passes_and_a_larger_cache_of_features():
    open_sizes = EngineConfig(max_running=64)
    assert (open_sizes.batch_tokens(False), open_sizes.batch_tokens(True)) == (2048, 8192)
    assert EngineConfig(max_running=9000).batch_tokens(True) == 9000
    assert open_sizes.vision_bytes(True) > open_sizes.vision_bytes(False) > 0
    given = EngineConfig(max_batch_tokens=100, vision_cache_bytes=0)
    assert (given.batch_tokens(True), given.vision_bytes(True)) == (100, 0)
    assert (
        EngineConfig(resume=False).vision_bytes(True)
        == EngineConfig(resume=False, vision_cache_bytes=5).vision_bytes(False)
        == 0
    )


def test_the_pool_takes_what_is_asked_for_or_what_the_device_has():
    page_bytes, gib = 100_000, 1 << 30
    assert EngineConfig(num_pages=7, kv_bytes=1).pages_that_fit(16, page_bytes, gib) == 7
    assert EngineConfig(kv_bytes=250_000).pages_that_fit(16, page_bytes, gib) == 2
    assert EngineConfig().pages_that_fit(16, page_bytes, 80 * gib) == 48 * gib // page_bytes
    assert EngineConfig(max_running=8).pages_that_fit(16, page_bytes) == 32_768 // 16
    assert EngineConfig(max_running=128, max_batch_tokens=128).pages_that_fit(16, page_bytes) == 128 * 1024 // 16
    assert EngineConfig().pages_that_fit(16, 10 * page_bytes) == gib // page_bytes // 10
    for config, free in ((EngineConfig(kv_bytes=99_999), None), (EngineConfig(), 160_000)):
        with pytest.raises(ValueError, match=r"engine.kv_bytes = 9\d*: keys and values of 1 tokens take 100000 bytes"):
            config.pages_that_fit(16, page_bytes, free)
    assert EngineConfig(kv_bytes=3 * page_bytes, least_tokens=48).pages_that_fit(16, page_bytes) == 3
    with pytest.raises(PoolTooSmall) as caught:
        EngineConfig(kv_bytes=3 * page_bytes, least_tokens=49).pages_that_fit(16, page_bytes)
    assert caught.value.needed_bytes == 4 * page_bytes


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_requests_cancellations_and_updates(seed, ahead):
    """Tiny pool, everything at once: whoever is not cancelled gets the answer of a quiet run."""
    rng = random.Random(seed)
    pictures = [image(k, h=2 * rng.randrange(1, 4), w=2 * rng.randrange(1, 4)) for k in range(4)]
    asks = []
    for k in range(40):
        chosen = [rng.choice(pictures) for _ in range(rng.randrange(3))]
        ids = prompt(rng.randrange(6), rng.randrange(4, 30), chosen)
        hot = {"temperature": 1.0, "seed": k, "top_p": 0.9} if rng.random() < 0.5 else {}
        asks.append(request(f"r{k}", ids, chosen, max_new_tokens=rng.randrange(1, 25), **hot))
    weights = hf_tensors(MODEL)

    async def storm(engine):
        tasks = []
        for ask in asks:
            tasks.append(asyncio.create_task(engine.generate(ask)))
            if rng.random() < 0.2:
                await asyncio.sleep(0.005 * rng.random())
            if rng.random() < 0.2:
                rng.choice(tasks).cancel()
            if rng.random() < 0.05:
                await engine.load_weights(weights, version=1)
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = run(storm, num_pages=30, max_batch_tokens=24, vision_cache_bytes=4000, encode_ahead=ahead)
    survivors = [(a, r) for a, r in zip(asks, results, strict=True) if not isinstance(r, asyncio.CancelledError)]
    assert len(survivors) > 20
    quiet = serve([ask for ask, _ in survivors], max_running=1, resume=False)
    for (_, stormy), calm in zip(survivors, quiet, strict=True):
        assert stormy.token_ids == calm.token_ids
        assert stormy.logprobs == pytest.approx(calm.logprobs, abs=TOLERANCE)


def test_two_event_loops_may_share_an_engine():
    engine = EmbeddedEngine(MODEL, Letters(), EngineConfig(page_size=4, num_pages=100, max_running=4))
    asks = [request(f"loop-{k}", prompt(k, 10)) for k in range(4)]
    try:
        with ThreadPoolExecutor(4) as pool:
            for ask, completion in zip(asks, pool.map(lambda a: asyncio.run(engine.generate(a)), asks), strict=True):
                assert_cold(completion, ask)
    finally:
        asyncio.run(engine.close())


def test_the_worker_works_on_the_device_of_the_model(monkeypatch):
    """A new thread begins on the first GPU, whatever the model is on."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    engine = EmbeddedEngine(tiny_model(), Letters())
    asyncio.run(engine.close())
    assert chosen == []
    engine.worker.device = torch.device("cuda:1")
    engine.worker.serve()  # ends at once: it is closed
    assert chosen == [torch.device("cuda:1")]
