"""Passes launched before the tokens of the one before them are known: nobody can tell by the answers.

On the CPU a pass is computed when it is launched; what it sampled stays unknown to the engine until it is taken in.
"""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

from tests.engine.harness import MODEL, TOLERANCE, assert_cold, run, serve
from tests.engine.tiny import Letters, image, prompt, request, tiny_model
from vtengine.engine.base import BackendFailed
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.engine.embedded.captures import Captures
from vtengine.engine.embedded.sampled import Fetched, Sampled
from vtengine.model import hf_tensors

CPU = torch.device("cpu")
HOT = {"temperature": 1.0, "seed": 1}
PADDED = pytest.mark.parametrize("padded", [False, True])
"""As graphs have it: batches filled up, lm_head and sampling over fixed memory."""


def pad(engine, padded=True):
    if padded:
        engine.runner.use(Captures(CPU, capture=False))


def sampled_twelve(ids):
    """(ids, an index from 3 on of one that does not come before) of a request that `HOT` makes again."""
    found = serve([request("h", ids, **HOT)])[0].token_ids
    return found, next(k for k in range(3, 12) if found[k] not in found[:k])


def watched(engine):
    """What happens in the worker: "launch" and "land"."""
    events, launch, commit = [], engine.runner.launch, engine.answers.commit
    engine.runner.launch = lambda rows: events.append("launch") or launch(rows)
    engine.answers.commit = lambda *sampled: events.append("land") or commit(*sampled)
    return events


@pytest.mark.parametrize("overlap", [False, True])
def test_a_pass_is_launched_before_the_one_before_it_is_taken_in(overlap):
    async def four_tokens(engine):
        events = watched(engine)
        await engine.generate(request("a", prompt(1, 9), max_new_tokens=4))
        return events

    one_by_one, ahead = ["launch", "land"] * 4, ["launch", *["launch", "land"] * 3, "land"]
    assert run(four_tokens, overlap=overlap) == (ahead if overlap else one_by_one)
    assert run(four_tokens) == one_by_one


def test_the_device_knows_a_token_before_the_host_does():
    sampled = Sampled(4, CPU)
    sampled.put(torch.tensor([7, 8, 9]), torch.tensor([-1.5, -0.1, float("nan")]))
    fetched = sampled.fetch(2)
    ids = torch.tensor([3, Sampled.of(2), Sampled.of(0), 151_000])
    assert sampled.known(ids).tolist() == [3, 9, 7, 151_000]
    sampled.put(torch.tensor([1, 2]), torch.tensor([0.0, 0.0]))
    ids, logprobs = fetched.wait()
    assert ids == [7, 8] and torch.tensor(logprobs).equal(torch.tensor([-1.5, -0.1]))


def random_requests(rng, count, pictures):
    """Greedy and sampled in every way, most of them with something that may end them at any token."""
    asks = []
    for k in range(count):
        chosen = [rng.choice(pictures) for _ in range(rng.randrange(3))]
        ids = prompt(rng.randrange(count // 4), rng.randrange(4, 30), chosen)
        how = {"max_new_tokens": rng.randrange(1, 25)}
        if rng.random() < 0.6:
            how |= {"temperature": rng.choice((0.7, 1.0)), "seed": k}
            how |= rng.choice(({}, {}, {"top_p": 0.9}, {"min_p": 0.02, "top_k": 40}, {"logit_bias": {5: 1.0}}))
        if rng.random() < 0.5:
            how["stop_token_ids"] = tuple(rng.sample(range(250), 20))
        if rng.random() < 0.3:
            how["stop"] = tuple(rng.sample("abcdefghijklmnop", 4))
        asks.append(request(f"r{k}", ids, chosen, **how))
    return asks


@PADDED
@pytest.mark.parametrize("seed", range(4))
def test_a_storm_ends_as_it_would_one_by_one(seed, padded):
    """Stops, cancellations at any token, preemptions, updates and pictures; those who are cancelled get a beginning."""
    rng = random.Random(seed)
    asks = random_requests(rng, 40, [image(k, h=2 * rng.randrange(1, 4), w=2 * rng.randrange(1, 4)) for k in range(4)])
    weights = hf_tensors(MODEL)

    async def storm(engine):
        pad(engine, padded)
        tasks, left = [], rng.sample(asks, 12)
        for ask in asks:
            length, leave = rng.randrange(1, 8), ask in left
            told = []

            def hear(ids, ask=ask, told=told, length=length, leave=leave):
                told.extend(ids)
                if leave and len(told) >= length:
                    engine.cancel(ask.request_id)

            tasks.append(asyncio.create_task(engine.generate(ask, hear)))
            if rng.random() < 0.2:
                await asyncio.sleep(0.005 * rng.random())
            if rng.random() < 0.05:
                await engine.load_weights(weights, version=1)
        return await asyncio.gather(*tasks), engine.stats()

    limits = {"num_pages": 18, "max_batch_tokens": 24, "vision_cache_bytes": 4000}
    stormy, stats = run(storm, overlap=True, encode_ahead=seed % 2 == 0, **limits)
    calm = serve(asks, max_running=1, resume=False, overlap=False)
    assert stats["preemptions"] > 0
    finishes = [completion.finish for completion in stormy]
    assert {"stop", "length"} <= set(finishes)
    for ask, got, expected in zip(asks, stormy, calm, strict=True):
        count = len(got.token_ids)
        assert got.token_ids == expected.token_ids[:count], ask
        assert got.logprobs == pytest.approx(expected.logprobs[:count], abs=TOLERANCE)
        assert got.finish == "cancelled" or (got.finish, count) == (expected.finish, len(expected.token_ids))
        assert got.cached_tokens + got.prefill_tokens == len(ask.token_ids)


@PADDED
@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("length", [17, 18, 19, 20])
def test_the_next_turn_finds_all_of_the_last_one_and_no_token_too_many(length, stops, padded):
    ids = prompt(length, length)
    whole, last = sampled_twelve(ids)
    stop = HOT | ({"stop_token_ids": (whole[last],)} if stops else {"max_new_tokens": last + 1})

    async def two_turns(engine):
        pad(engine, padded)
        first = await engine.generate(request("t1", ids, **stop))
        while not engine.scheduler.idle or engine.worker._flight:
            await asyncio.sleep(0.001)
        cached = engine.tree.num_pages
        ask = request("t2", [*ids, *first.token_ids, *prompt(3, 6)], max_new_tokens=6)
        return first, cached, ask, await engine.generate(ask)

    for page_size in (1, 4):
        first, cached, ask, second = run(two_turns, overlap=True, page_size=page_size)
        assert first.token_ids == whole[: last + 1] and first.finish == ("stop" if stops else "length")
        computed = length + last + stops  # the last token is, where another pass was on its way
        assert second.cached_tokens == computed and cached == -(-computed // page_size)
        assert_cold(second, ask)


def test_a_token_too_many_costs_one_row_and_is_told_to_nobody():
    ids = prompt(1, 20)
    greedy = serve([request("g", ids)])[0].token_ids

    async def stop_early(engine):
        told = []
        ask = request("a", ids, stop_token_ids=(greedy[0],), max_new_tokens=50)
        completion = await engine.generate(ask, told.extend)
        while not engine.scheduler.idle or engine.worker._flight:
            await asyncio.sleep(0.001)
        return completion, told, engine.stats()

    completion, told, stats = run(stop_early, overlap=True)
    assert completion.token_ids == tuple(told) == greedy[:1]
    assert stats["generated_tokens"] == 1 and stats["batch_tokens"] == len(ids) + 1


def test_siblings_and_those_who_come_later_answer_alike():
    asks = [request(f"s{k}", prompt(1, 30), temperature=0.9, seed=k % 4, max_new_tokens=8) for k in range(8)]
    late = [request(f"l{k}", prompt(1, 30), temperature=0.9, seed=k, max_new_tokens=8) for k in range(4)]

    async def in_two_waves(engine):
        pad(engine)
        tasks = [asyncio.create_task(engine.generate(ask)) for ask in asks]
        while engine.stats()["generated_tokens"] < 20:
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks, *map(engine.generate, late))

    found = run(in_two_waves, overlap=True, share_prefix=True)
    expected = serve(late, share_prefix=False)
    for k, completion in enumerate(found):
        assert completion.token_ids == expected[k % 4].token_ids
        assert completion.logprobs == pytest.approx(expected[k % 4].logprobs, abs=TOLERANCE)


@PADDED
def test_scores_that_are_not_finite_fail_what_runs_and_leave_nothing_behind(padded):
    model = tiny_model(0)
    name = "model.layers.0.mlp.down_proj.weight"
    good = hf_tensors(model)[name].clone()

    async def diverge(engine):
        pad(engine, padded)
        await engine.load_weights({name: torch.full_like(good, 1e38)}, version=1)
        failing = (engine.generate(request(f"r{k}", prompt(k, 20), max_new_tokens=9)) for k in range(3))
        errors = await asyncio.gather(*failing, return_exceptions=True)
        assert all(isinstance(e, BackendFailed) and "the model's scores are not finite" in str(e) for e in errors)
        await engine.load_weights({name: good}, version=2)
        ask = request("after", prompt(1, 20))
        return ask, await engine.generate(ask)

    ask, after = run(diverge, model=model, overlap=True)
    assert_cold(after, ask, tiny_model(0))


def test_what_nobody_wants_may_be_anything():
    """The row of a sequence that ended has NaN in the pass that was on its way."""
    ids = prompt(1, 20)
    whole, cut = sampled_twelve(ids)

    async def stop_then_nan(engine):
        launch, passes = engine.runner.launch, []

        def with_nan(rows):
            flight = launch(rows)
            passes.append(rows)
            if len(passes) == cut + 2:  # that of the token too many
                flight.sampled._numbers[:, 1].view(torch.float64).fill_(float("nan"))
            return flight

        engine.runner.launch = with_nan
        first = await engine.generate(request("a", ids, stop_token_ids=(whole[cut],), **HOT))
        return first, len(passes), await engine.generate(request("b", ids, **HOT))

    first, passes, second = run(stop_then_nan, overlap=True)
    assert first.token_ids == whole[: cut + 1] and passes == cut + 2
    assert second.token_ids == whole


def test_a_request_of_an_engine_that_was_just_closed_may_be_cancelled():
    """Until the event loop hears of its end, it is known."""

    async def cancel():
        engine = EmbeddedEngine(MODEL, Letters(), EngineConfig(page_size=4, num_pages=3000, overlap=True))
        task = asyncio.create_task(engine.generate(request("a", prompt(1, 9), max_new_tokens=8000)))
        await asyncio.sleep(0.01)
        engine.worker.close()  # without a turn of the loop
        engine.cancel("a")
        with pytest.raises(BackendFailed, match="closed"):
            await task

    asyncio.run(cancel())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_that_is_lost_while_a_pass_is_on_its_way_leaves_nobody_waiting(monkeypatch):
    def lost(*_):
        raise RuntimeError("the device is lost")

    async def lose(engine):
        tasks = [asyncio.create_task(engine.generate(request(n, prompt(1, 9), max_new_tokens=500))) for n in "ab"]
        while engine.stats()["generated_tokens"] < 4:
            await asyncio.sleep(0.001)
        engine.runner.cache.reset = lost
        monkeypatch.setattr(Fetched, "wait", lost)
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        engine.worker.thread.join(30)
        return errors, engine.is_closed

    errors, closed = run(lose, model=tiny_model(), overlap=True)
    assert closed and all(isinstance(e, BackendFailed) and "the device is lost" in str(e) for e in errors)


def test_mixed_ways_to_sample_in_one_captured_batch():
    """Greedy rows beside drawn ones, of several temperatures, some with limits; no graph where one has a bias."""
    ways = [{}, {"temperature": 0.5}, {"temperature": 1.3}, {"temperature": 1e-9}, {}, {"temperature": 1.0}]
    asks = [request(f"w{k}", prompt(k, 9), seed=k, **way) for k, way in enumerate(ways)]
    limits = [{"top_p": 0.8}, {"top_k": 7}, {"min_p": 0.05, "top_p": 0.9}]
    asks += [
        request(f"l{k}", prompt(k, 9), seed=k, temperature=1.0, max_new_tokens=8, **x) for k, x in enumerate(limits)
    ]
    asks.append(request("bias", prompt(8, 9), seed=8, temperature=1.0, logit_bias={3: 2.0}, max_new_tokens=4))
    keys = []

    async def all_at_once(engine):
        pad(engine)
        found = await asyncio.gather(*map(engine.generate, asks))
        keys.extend(key[2:] for key in engine.runner.captures.replays if key[0] == "head")
        return found

    found = run(all_at_once, overlap=True, max_running=16)
    for completion, expected in zip(found, serve(asks, max_running=16), strict=True):
        assert completion.token_ids == expected.token_ids
        assert completion.logprobs == pytest.approx(expected.logprobs, abs=TOLERANCE)
    assert {(True, 2), (True, 1)} <= set(keys)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_on_the_gpu(cuda_graphs):
    rng = random.Random(0)
    asks = random_requests(rng, 24, [image(1), image(2)])

    async def all_at_once(engine):
        return await asyncio.gather(*map(engine.generate, asks))

    model = tiny_model().cuda().requires_grad_(False)
    one_by_one = run(all_at_once, model=model, cuda_graphs=False, overlap=False)
    found = run(all_at_once, model=model, cuda_graphs=cuda_graphs)
    for completion, expected in zip(found, one_by_one, strict=True):
        assert completion.token_ids == expected.token_ids and completion.finish == expected.finish
        assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-3)


def test_letters_end_requests():
    """What the storm relies on: its stop strings are found in what the tiny model says."""
    asks = [request(f"r{k}", prompt(k, 9), stop=tuple("abcdefgh"), max_new_tokens=30) for k in range(8)]
    found = serve(asks, overlap=True)
    assert any(c.finish == "stop" and Letters().decode(c.token_ids)[-1] in "abcdefgh" for c in found)
