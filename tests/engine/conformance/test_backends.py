"""What every `Backend` promises its callers, whatever is behind it."""

from __future__ import annotations

import asyncio

import pytest

from tests.engine.conformance.backends import BACKENDS, SHARES_IN_FLIGHT
from tests.engine.tiny import PAD, STOP, image, prompt, request
from vtengine.engine.base import RequestRejected


@pytest.fixture(scope="module")
def loop():
    """One event loop for all tests: SGLang's engine stays bound to the one that it was first used in."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=sorted(BACKENDS))
def serve(request, loop):
    """Runs an async function with a fresh backend, and closes it."""

    def run(function):
        async def main():
            backend = BACKENDS[request.param]()
            try:
                return await asyncio.wait_for(function(backend), 60)
            finally:
                await backend.close()

        return loop.run(main())

    return run


def test_a_completion_adds_up(serve):
    pictures = [image(1), image(2)]
    ask = request("a", prompt(1, 20, pictures), pictures, stop_token_ids=(STOP,))
    completion = serve(lambda backend: backend.generate(ask))
    assert completion.request_id == "a"
    assert completion.prompt_tokens == len(ask.token_ids)
    assert completion.cached_tokens + completion.prefill_tokens == completion.prompt_tokens
    assert completion.cached_tokens == 0
    assert len(completion.logprobs) == len(completion.token_ids) <= 12
    assert all(logprob <= 0 for logprob in completion.logprobs)
    assert completion.finish in ("stop", "length")
    assert (completion.token_ids[-1] == STOP) == (completion.finish == "stop")
    assert completion.images_encoded == (True, True)
    assert 0 <= completion.ttft_s <= completion.latency_s


def test_the_second_turn_resumes_and_encodes_only_the_new_image(serve):
    low, high = image(1), image(2, h=6, w=8)
    first_ids = prompt(1, 20, [low])

    async def two_turns(backend):
        first = await backend.generate(request("turn-1", first_ids, [low]))
        ids = [*first_ids, *first.token_ids, 9, 253, *[PAD] * high.visual_tokens, 254, 8]
        return first, await backend.generate(request("turn-2", ids, [low, high]))

    first, second = serve(two_turns)
    new = 4 + high.visual_tokens
    assert second.prompt_tokens == len(first_ids) + len(first.token_ids) + new
    assert new <= second.prefill_tokens <= new + 1
    assert second.images_encoded == (False, True)


def test_concurrent_siblings_encode_their_image_once(serve):
    picture = image(1)
    ids = prompt(1, 20, [picture])

    async def siblings(backend):
        asks = [request(f"s{k}", ids, [picture], temperature=1.0, seed=k) for k in range(6)]
        return await asyncio.gather(*(backend.generate(ask) for ask in asks))

    completions = serve(siblings)
    assert [c.request_id for c in completions] == [f"s{k}" for k in range(6)]
    if SHARES_IN_FLIGHT:
        assert sum(c.images_encoded[0] for c in completions) == 1
        assert sum(c.prefill_tokens for c in completions) == len(ids) + 5


def test_streamed_chunks_join_to_the_completion(serve):
    async def collect(backend):
        chunks = []
        completion = await backend.generate(request("s", prompt(2, 9)), chunks.append)
        return completion, list(chunks)

    completion, chunks = serve(collect)
    assert all(chunks), "no empty chunk"
    assert sum(map(tuple, chunks), ()) == completion.token_ids


def test_the_limit_of_new_tokens_is_kept(serve):
    completion = serve(lambda backend: backend.generate(request("a", prompt(1, 8), max_new_tokens=3)))
    assert len(completion.token_ids) == 3 and completion.finish == "length"


def test_text_alone_is_answered_beside_an_image(serve):
    async def both(backend):
        picture = image(1)
        asked = request("text", prompt(4, 30)), request("image", prompt(5, 9, [picture]), [picture])
        return await asyncio.gather(*map(backend.generate, asked))

    text, beside = serve(both)
    assert text.images_encoded == () and text.prompt_tokens == 30 and text.token_ids
    assert beside.images_encoded == (True,)


def test_impossible_requests_are_rejected_with_a_code(serve):
    async def codes(backend):
        found = []
        for ask in (request("empty", ()), request("pads", (1, PAD, PAD)), request("image", (1, 2), [image(1)])):
            with pytest.raises(RequestRejected) as error:
                await backend.generate(ask)
            found.append(error.value.code)
        return found

    assert serve(codes) == ["empty_prompt", "image_tokens_mismatch", "image_tokens_mismatch"]


def test_cancelling_one_task_leaves_the_others_alone(serve):
    async def cancel_first(backend):
        asks = [request(f"c{k}", prompt(k, 10), max_new_tokens=10) for k in range(3)]
        tasks = [asyncio.create_task(backend.generate(ask)) for ask in asks]
        await asyncio.sleep(0)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = serve(cancel_first)
    assert isinstance(first, asyncio.CancelledError)
    assert all(len(other.token_ids) == 10 for other in others)


def test_leaving_a_stream_early_is_harmless(serve):
    async def abandon(backend):
        chunks, begun = [], asyncio.Event()

        def on_tokens(token_ids):
            chunks.append(token_ids)
            begun.set()

        task = asyncio.create_task(backend.generate(request("s", prompt(2, 9), max_new_tokens=100), on_tokens))
        await begun.wait()
        task.cancel()
        before = len(chunks)
        await asyncio.gather(task, return_exceptions=True)
        again = await backend.generate(request("s", prompt(2, 9)))
        assert len(chunks) == before or task.exception() is None, "who has left is told nothing more"
        return again

    assert serve(abandon).request_id == "s"


def test_what_the_caller_of_a_stream_raises_is_its_own_affair(serve):
    async def raise_in_one(backend):
        def broken(token_ids):
            raise KeyError("of the caller")

        asks = [request(f"r{k}", prompt(k, 10), max_new_tokens=10) for k in range(3)]
        calls = [backend.generate(ask, broken if k == 0 else [].append) for k, ask in enumerate(asks)]
        return await asyncio.gather(*calls, return_exceptions=True)

    first, *others = serve(raise_in_one)
    assert isinstance(first, KeyError)
    assert all(len(other.token_ids) == 10 for other in others)


def test_new_weights_change_the_version_and_drop_the_caches(serve):
    picture = image(1)
    ids = prompt(1, 20, [picture])

    async def update(backend):
        await backend.generate(request("old", ids, [picture]))
        await backend.load_weights({}, version=7)
        return await backend.generate(request("new", ids, [picture]))

    completion = serve(update)
    assert completion.weight_version == 7
    assert completion.cached_tokens == 0 and completion.images_encoded == (True,)


def test_stats_are_flat_numbers(serve):
    async def after_one(backend):
        await backend.generate(request("a", prompt(1, 8)))
        return backend.stats()

    stats = serve(after_one)
    assert all(isinstance(value, float) for value in stats.values())
    assert stats["requests"] == 1 and stats["prefill_tokens"] == 8 and stats["generated_tokens"] > 0
