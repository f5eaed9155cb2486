"""The scripted backend: replies, cuts, and the account of a perfect prefix cache."""

from __future__ import annotations

import asyncio

import pytest

from vtengine.engine.base import BackendFailed, ImageInput, Request, RequestRejected, SamplingParams
from vtengine.engine.scripted import ScriptedBackend

PAD = 999
STOP = 998


class Letters:
    """One id per character; special ids for the two markers."""

    def encode_trusted(self, text: str) -> list[int]:
        return [PAD] if text == "<|image_pad|>" else [ord(c) for c in text]


def ask(backend, ids, request_id="r", images=(), **sampling):
    return asyncio.run(backend.generate(Request(request_id, tuple(ids), tuple(images), SamplingParams(**sampling))))


def image(content_hash, tokens=4):
    return ImageInput(content_hash, (1, 2, 2 * tokens), pixel_values=None)


def test_replies_in_order_then_fails():
    backend = ScriptedBackend(Letters(), ["ab", ValueError("planned")])
    first = ask(backend, [1, 2, 3], stop_token_ids=(STOP,))
    assert first.token_ids == (ord("a"), ord("b"), STOP)
    assert first.finish == "stop" and len(first.logprobs) == 3
    with pytest.raises(ValueError, match="planned"):
        ask(backend, [1])
    with pytest.raises(BackendFailed, match="only 2 replies"):
        ask(backend, [1])


def test_callable_replies_and_cuts():
    backend = ScriptedBackend(Letters(), lambda request: f"<{request.request_id}>tail")
    assert ask(backend, [1], "x", stop=(">",)).token_ids == tuple(map(ord, "<x>"))
    cut = ask(backend, [1], "x", max_new_tokens=2, stop_token_ids=(STOP,))
    assert cut.token_ids == tuple(map(ord, "<x")) and cut.finish == "length"


def test_second_turn_is_cached_but_for_the_new_tokens():
    backend = ScriptedBackend(Letters(), ["yes", "no"])
    prompt = [5, *[PAD] * 4, 6]
    first = ask(backend, prompt, images=[image("h1")], stop_token_ids=(STOP,))
    assert (first.cached_tokens, first.images_encoded) == (0, (True,))
    longer = [*prompt, *first.token_ids, 7, *[PAD] * 2, 8]
    second = ask(backend, longer, images=[image("h1"), image("h2", 2)])
    assert second.cached_tokens == len(prompt) + len(first.token_ids)
    assert second.prefill_tokens == 4
    assert second.images_encoded == (False, True)


def test_other_image_does_not_match():
    backend = ScriptedBackend(Letters(), lambda _: "x")
    prompt = [5, *[PAD] * 4, 6]
    ask(backend, prompt, images=[image("h1")])
    assert ask(backend, prompt, images=[image("h2")]).cached_tokens == 1
    assert ask(backend, prompt, images=[image("h2")]).cached_tokens == len(prompt) - 1
    with pytest.raises(RequestRejected, match="4 image placeholders for 3"):
        ask(backend, prompt, images=[image("h1", 3)])


def test_weights_drop_the_caches_and_what_was_streamed_is_the_completion():
    backend = ScriptedBackend(Letters(), lambda _: "abc")

    async def run():
        await backend.generate(Request("a", (1, 2, 3)))
        await backend.load_weights({}, version=3)
        chunks = []
        completion = await backend.generate(Request("b", (1, 2, 3)), chunks.append)
        await backend.close()
        return chunks, completion

    chunks, completion = asyncio.run(run())
    assert sum(chunks, ()) == completion.token_ids
    assert completion.weight_version == 3 and completion.cached_tokens == 0
    assert backend.stats()["requests"] == 2
