"""The embedded engine against a plain forward pass without caches, in every way it may cut the work up."""

from __future__ import annotations

import asyncio

import pytest
import torch

from tests.engine.tiny import PAD, STOP, VIDEO, Letters, cold_greedy, cold_logits, image, prompt, request, tiny_model
from vtengine.engine.base import BackendFailed, RequestRejected
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.model import ModelLoadError, hf_tensors

MODEL = tiny_model()
TOLERANCE = 1e-4


def run(function, model=MODEL, **config):
    """Runs an async function of an engine; checks every book when it is done."""
    config = {"page_size": 4, "num_pages": 300, "max_batch_tokens": 64, "max_running": 8} | config

    async def main():
        engine = EmbeddedEngine(model, Letters(), EngineConfig(**config))
        try:
            result = await asyncio.wait_for(function(engine), 60)
            await settle(engine)
            engine.scheduler.check_integrity()
            engine.vision.check_integrity()
            return result
        finally:
            await engine.close()

    return asyncio.run(main())


async def settle(engine):
    while not engine.scheduler.idle:
        await asyncio.sleep(0.001)


def serve(requests, **config):
    return run(lambda engine: asyncio.gather(*map(engine.generate, requests)), **config)


def assert_cold(completion, ask, model=MODEL):
    ids, logprobs = cold_greedy(model, ask.token_ids, ask.images, len(completion.token_ids))
    assert completion.token_ids == ids
    assert completion.logprobs == pytest.approx(logprobs, abs=TOLERANCE)


def mixed_requests(count=6, **sampling):
    pictures = [image(1), image(2, h=6, w=6, width=1176), image(3, h=2, w=2)]
    return [
        request(f"r{k}", prompt(k, 6 + 5 * k, pictures[: k % 4]), pictures[: k % 4], **sampling) for k in range(count)
    ]


@pytest.mark.parametrize("budget", [8, 9, 13, 31, 64, 2048])
def test_greedy_equals_a_cold_run_at_any_chunk_size(budget):
    requests = mixed_requests()
    for completion, ask in zip(serve(requests, max_batch_tokens=budget), requests, strict=True):
        assert_cold(completion, ask)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_greedy_equals_a_cold_run_at_any_page_size(page_size):
    requests = mixed_requests(4)
    for completion, ask in zip(serve(requests, page_size=page_size), requests, strict=True):
        assert_cold(completion, ask)


def test_preemption_in_a_tiny_pool_changes_no_answer():
    requests = [request(f"p{k}", prompt(k, 10), max_new_tokens=24) for k in range(6)]
    requests.append(request("image", prompt(9, 8, [image(1)]), [image(1)], max_new_tokens=20))
    requests.append(request("seeded", prompt(10, 10), max_new_tokens=24, temperature=1.0, seed=5))

    async def with_stats(engine):
        return await asyncio.gather(*map(engine.generate, requests)), engine.stats()

    completions, stats = run(with_stats, num_pages=20)
    assert stats["preemptions"] > 0
    for completion, ask in zip(completions[:-1], requests[:-1], strict=True):
        assert len(completion.token_ids) == ask.sampling.max_new_tokens
        assert completion.cached_tokens + completion.prefill_tokens == len(ask.token_ids)
        assert_cold(completion, ask)
    alone = serve(requests[-1:])[0]
    assert completions[-1].token_ids == alone.token_ids


def turns(first_ids, first, extra, pictures):
    ids = [*first_ids, *first.token_ids, 9]
    for picture in pictures:
        ids += [253, *[PAD] * picture.visual_tokens, 254]
    return [*ids, *extra]


@pytest.mark.parametrize("length", [17, 18, 19, 20])
def test_resumption_is_exact_and_counted(length):
    low, high = image(1), image(2, h=8, w=6)
    first_ids = prompt(length, length, [low])

    async def two_turns(engine):
        first = await engine.generate(request("t1", first_ids, [low]))
        ids = turns(first_ids, first, [5, 6, 7], [high])
        ask = request("t2", ids, [low, high], max_new_tokens=6)
        return first, ask, await engine.generate(ask)

    first, ask, second = run(two_turns)
    old = len(first_ids) + len(first.token_ids)
    assert second.cached_tokens == old // 4 * 4
    assert second.prefill_tokens - (len(ask.token_ids) - old) < 4
    assert second.images_encoded == (False, True)
    assert_cold(second, ask)


def test_logits_of_a_resumed_turn_equal_a_cold_run():
    """All logits, not just the winner: sampled through a recording head."""
    low, high = image(1), image(2, h=8, w=6)
    first_ids = prompt(1, 30, [low])
    model = tiny_model()
    seen, head = [], model.logits
    model.logits = lambda hidden: seen.append(head(hidden)) or seen[-1].clone()

    async def two_turns(engine):
        first = await engine.generate(request("t1", first_ids, [low]))
        seen.clear()
        ids = turns(first_ids, first, [5, 6, 7], [high])
        await engine.generate(request("t2", ids, [low, high], max_new_tokens=1))
        return ids

    ids = run(two_turns, model=model)
    cold = cold_logits(MODEL, ids, [low, high])[-1]
    assert (seen[0][0] - cold).abs().max() < TOLERANCE


def test_resume_off_reuses_nothing():
    picture = image(1)
    ask = [request(f"r{k}", prompt(1, 20, [picture]), [picture]) for k in range(2)]

    async def one_after_the_other(engine):
        return [await engine.generate(a) for a in ask] + list(await asyncio.gather(*map(engine.generate, ask)))

    for completion in run(one_after_the_other, resume=False):
        assert completion.cached_tokens == 0 and completion.images_encoded == (True,)
        assert_cold(completion, ask[0])


def test_siblings_prefill_and_encode_once():
    picture = image(1)
    requests = [
        request(f"s{k}", prompt(1, 30, [picture]), [picture], temperature=0.9, seed=k, max_new_tokens=5)
        for k in range(8)
    ]
    completions = serve(requests)
    total = len(requests[0].token_ids)
    assert [c.cached_tokens for c in completions] == [0] + [(total - 1) // 4 * 4] * 7
    assert [c.images_encoded for c in completions] == [(True,)] + [(False,)] * 7
    assert len({c.token_ids for c in completions}) > 1


def test_other_pixels_under_the_same_tokens_are_not_confused():
    pictures = [image(k) for k in range(4)]
    requests = [request(f"i{k}", prompt(1, 20, [p]), [p]) for k, p in enumerate(pictures)]
    for completion, ask in zip(serve(requests, max_running=1, max_batch_tokens=64), requests, strict=True):
        assert completion.cached_tokens <= 8
        assert_cold(completion, ask)


def test_a_tiny_vision_cache_only_costs_time():
    requests = mixed_requests(8)
    for completion, ask in zip(serve(requests, vision_cache_bytes=600, max_batch_tokens=9), requests, strict=True):
        assert_cold(completion, ask)


def test_the_same_seed_gives_the_same_sample_whatever_the_batch():
    sampling = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 11}
    ask = request("seeded", prompt(1, 20), **sampling)
    crowd = [request(f"x{k}", prompt(k, 5 + k), temperature=1.3, seed=k, max_new_tokens=20) for k in range(12)]
    alone = serve([ask])[0]
    assert serve([*crowd, ask])[-1].token_ids == alone.token_ids
    assert serve([ask, *crowd], max_batch_tokens=8)[0].token_ids == alone.token_ids
    assert serve([request("seeded", prompt(1, 20), **(sampling | {"seed": 12}))])[0].token_ids != alone.token_ids


def test_without_a_seed_samples_differ():
    requests = [request(f"r{k}", prompt(1, 20), temperature=1.5) for k in range(4)]
    assert len({c.token_ids for c in serve(requests)}) == 4


def test_stop_ids_stop_strings_and_bias():
    ids = prompt(1, 20)
    greedy = serve([request("g", ids)])[0].token_ids
    stopped = serve([request("s", ids, stop_token_ids=(greedy[4],))])[0]
    cut = greedy.index(greedy[4]) + 1
    assert stopped.token_ids == greedy[:cut] and stopped.finish == "stop"
    text = Letters().decode(greedy)
    stop = text[3:6]
    by_text = serve([request("t", ids, stop=("never", stop))])[0]
    assert by_text.finish == "stop" and Letters().decode(by_text.token_ids) == text[: text.index(stop) + len(stop)]
    biased = serve([request("b", ids, logit_bias={greedy[0]: -torch.inf, 42: 1e4}, max_new_tokens=3)])[0]
    assert biased.token_ids == (42, 42, 42) and biased.logprobs == pytest.approx((0, 0, 0), abs=1e-5)


def test_image_markers_are_never_sampled():
    asks = [request("a", prompt(1, 9), logit_bias={PAD: 1e4, VIDEO: 1e4}, temperature=t, seed=1) for t in (0.0, 2.0)]
    for ask in asks:
        assert not {PAD, VIDEO} & set(serve([ask])[0].token_ids)


def test_cancel_by_id_returns_what_there_is_and_keeps_its_pages():
    ids = prompt(1, 20)

    async def cancel_midway(engine):
        stream = engine.stream(request("c", ids, max_new_tokens=1000))
        chunks = [await anext(stream) for _ in range(5)]
        engine.cancel("c")
        engine.cancel("unknown")
        chunks += [chunk async for chunk in stream]
        again = await engine.generate(request("again", ids))
        return chunks[-1].completion, again

    cancelled, again = run(cancel_midway)
    assert cancelled.finish == "cancelled" and 5 <= len(cancelled.token_ids) < 1000
    assert again.cached_tokens == 16
    assert cancelled.token_ids[:5] == again.token_ids[:5]


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
        assert error.value.code == "request_too_large"
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
        (request("a", (PAD, 1, *[PAD] * 5), [image(1)]), "image_tokens_mismatch"),
        (request("a", (1, *[PAD] * 6), [image(1, width=500)]), "image_shape"),
    ],
)
def test_malformed_requests_are_rejected(ask, code):
    async def reject(engine):
        with pytest.raises(RequestRejected) as error:
            await engine.generate(ask)
        return error.value.code

    assert run(reject) == code


def test_a_request_id_is_served_once_at_a_time():
    async def twice(engine):
        return await asyncio.gather(
            *(engine.generate(request("same", (1, 2))) for _ in range(2)), return_exceptions=True
        )

    first, second = run(twice)
    assert len(first.token_ids) == 12 and second.code == "duplicate_request"


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


def test_an_update_waits_for_what_runs_and_holds_back_what_waits():
    async def update_midway(engine):
        asks = [request(f"r{k}", prompt(k, 10), max_new_tokens=30) for k in range(4)]
        tasks = [asyncio.create_task(engine.generate(a)) for a in asks]
        while not engine.scheduler.running:
            await asyncio.sleep(0.001)
        await engine.load_weights(hf_tensors(tiny_model(1)), version=1)
        return asks, await asyncio.gather(*tasks)

    asks, completions = run(update_midway, model=tiny_model(0), max_running=2, max_batch_tokens=16)
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


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on():
    model = tiny_model()
    decode, calls = model.decode, []

    def decode_once_broken(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("planned")
        return decode(*args)

    model.decode = decode_once_broken

    async def fail(engine):
        asks = mixed_requests(3)
        failed = await asyncio.gather(*map(engine.generate, asks), return_exceptions=True)
        return failed, await engine.generate(asks[0]), asks[0]

    failed, after, ask = run(fail, model=model)
    assert all(isinstance(error, BackendFailed) and "planned" in str(error) for error in failed)
    assert_cold(after, ask)


def test_closing_fails_what_is_left_and_refuses_more():
    async def close_midway():
        engine = EmbeddedEngine(MODEL, Letters(), EngineConfig(page_size=4, num_pages=300))
        task = asyncio.create_task(engine.generate(request("a", prompt(1, 9), max_new_tokens=1000)))
        await asyncio.sleep(0.01)
        await engine.close()
        errors = await asyncio.gather(task, return_exceptions=True)
        with pytest.raises(BackendFailed, match="closed"):
            await engine.generate(request("b", (1,)))
        return errors[0]

    assert isinstance(asyncio.run(close_midway()), BackendFailed)


def test_the_stop_id_is_the_last_id():
    requests = [request(f"r{k}", prompt(k, 9), logit_bias={STOP: 3.0}, stop_token_ids=(STOP,), temperature=1.0, seed=k)
                for k in range(6)]  # fmt: skip
    for completion in serve(requests):
        assert STOP not in completion.token_ids[:-1]
        assert (completion.finish == "stop") == (completion.token_ids[-1] == STOP)


@pytest.mark.parametrize(
    ("field", "value"), [("page_size", 0), ("num_pages", 0), ("max_batch_tokens", 4), ("num_threads", 0)]
)
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"engine.{field} = {value}"):
        EngineConfig(**{field: value})
