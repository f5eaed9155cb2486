"""The embedded engine against a plain forward pass without caches, in every way it may cut the work up."""

from __future__ import annotations

import asyncio

import pytest
import torch
from vtengine_kernels.prefix_attention import native

from tests.engine.harness import MODEL, TOLERANCE, assert_cold, mixed_requests, run, serve
from tests.engine.tiny import PAD, STOP, VIDEO, Letters, cold_logits, image, prompt, request, tiny_model
from vtengine.engine.embedded import attention


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
    assert second.cached_tokens == old - 1  # the last one was sampled, and never computed
    assert second.prefill_tokens == len(ask.token_ids) - old + 1
    assert second.images_encoded == (False, True)
    assert_cold(second, ask)


def test_logits_of_a_resumed_turn_equal_a_cold_run():
    """All logits, not just the winner: sampled through a recording head."""
    low, high = image(1), image(2, h=8, w=6)
    first_ids = prompt(1, 30, [low])
    model = tiny_model()
    seen, head = [], model.scores
    model.scores = lambda hidden: seen.append(head(hidden)) or seen[-1].clone()

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


def test_the_stop_id_is_the_last_id():
    requests = [request(f"r{k}", prompt(k, 9), logit_bias={STOP: 3.0}, stop_token_ids=(STOP,), temperature=1.0, seed=k)
                for k in range(6)]  # fmt: skip
    for completion in serve(requests):
        assert STOP not in completion.token_ids[:-1]
        assert (completion.finish == "stop") == (completion.token_ids[-1] == STOP)


def test_bfloat16_is_decoded_over_pages_too(monkeypatch):
    model, calls = tiny_model().to(torch.bfloat16), []
    kernel = attention.prefix_attention
    monkeypatch.setattr(attention, "prefix_attention", lambda *args: calls.append(args[0].dtype) or kernel(*args))
    asks = mixed_requests(3, max_new_tokens=4)
    for completion in run(lambda engine: asyncio.gather(*map(engine.generate, asks)), model=model):
        assert len(completion.token_ids) == 4
    assert (torch.bfloat16 in calls) == (native.missing() is None)
    first = cold_logits(model, asks[0].token_ids)[-1].float()
    assert abs(float(first.log_softmax(-1)[completion_of(model, asks[0])]) - float(first.log_softmax(-1).max())) < 0.2


def completion_of(model, ask):
    return run(lambda engine: engine.generate(ask), model=model).token_ids[0]
