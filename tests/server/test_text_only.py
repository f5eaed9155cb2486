"""Chats without an image, through OpenAI's client, over scripted replies, the embedded engine and an SGLang server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.engine.sglang.fake_server import FakeSglang
from tests.server.running import (
    ANSWER,
    CALL,
    MODEL,
    Running,
    ask,
    embedded_backend,
    make_setting,
    running,
    wait_for,
)
from tests.server.test_completions import joined
from tests.server.test_refusals import error_of
from tests.tiny_model import TINY_VISION, byte_encoder, config_of, tiny_text
from vtengine.engine.base import Request
from vtengine.engine.sglang import ServedModel, SglangHttpBackend
from vtengine.rollout.tokenizer import Tokenizer

Serve = Callable[..., Running]
HELLO = [{"role": "user", "content": "Hello"}]
FOUR = "<think>2 and 2</think><answer> 4 </answer>"


def create(server: Running, **options: Any) -> Any:
    return server.client().chat.completions.create(**({"model": MODEL, "messages": HELLO} | options))


def prompt_of(server: Running) -> str:
    backend: Any = server.backend
    return server.house.setting.tokenizer.decode(backend.requests[-1].token_ids)


def test_one_turn_without_a_view(serve: Serve) -> None:
    server = serve(lambda _: FOUR, profile="vtengine")
    reply = create(server)
    choice, account = reply.choices[0], reply.vtengine
    assert (choice.message.content, choice.message.reasoning_content, choice.finish_reason) == ("4", "2 and 2", "stop")
    assert account["status"] == "answered" and not account["upscaled"]
    assert (account["visual_tokens"], account["visual_tokens_full"]) == (0, 0)
    (turn,) = account["turns"]
    assert turn["views"] == [] and turn["action"] is None
    request = server.backend.requests[0]  # type: ignore[attr-defined]
    assert request.images == () and reply.usage.prompt_tokens == len(request.token_ids) == turn["prompt_tokens"]
    assert reply.usage.completion_tokens == len(FOUR) + 1, "bytes are tokens here, and the closing mark"
    assert "tool" not in prompt_of(server) and "image" not in prompt_of(server)
    assert server.metrics()["vtengine_visual_tokens_total"] == server.metrics()["vtengine_episodes_upscaled_total"] == 0


def test_stream_equals_whole(serve: Serve) -> None:
    server = serve(lambda _: FOUR)
    chunks = list(create(server, stream=True, stream_options={"include_usage": True}, n=2))
    accounts = [chunk.vtengine for chunk in chunks if getattr(chunk, "vtengine", None)]
    assert [event["views"] for event in accounts if event.get("event") == "turn_started"] == [[], []]
    assert [event["visual_tokens"] for event in accounts if "status" in event] == [0, 0]
    assert joined([chunk for chunk in chunks if chunk.choices and chunk.choices[0].index == 1], "content") == "4"
    assert chunks[-1].usage.completion_tokens == 2 * (len(FOUR) + 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_ends_the_turn(serve: Serve, stream: bool) -> None:
    server = serve(lambda _: CALL, profile="vtengine", max_turns=4)
    reply = create(server, stream=stream)
    if stream:
        *_, last = chunks = list(reply)
        account, finish, content = last.vtengine, last.choices[0].finish_reason, joined(chunks, "content")
    else:
        account, finish = reply.vtengine, reply.choices[0].finish_reason
        content = reply.choices[0].message.content
        assert "resize_image" in reply.choices[0].message.reasoning_content
    assert (account["status"], account["error"]["code"], len(account["turns"])) == ("malformed", "tool_not_offered", 1)
    assert (finish, content) == ("stop", "")


def test_a_model_that_does_not_know_the_protocol(serve: Serve) -> None:
    server = serve(lambda _: "Hi, how can I help?")
    assert create(server).choices[0].message.content == "Hi, how can I help?"
    assert joined(list(create(server, stream=True)), "content") == "Hi, how can I help?"


def test_options_and_messages_keep_their_meaning(serve: Serve) -> None:
    server = serve(lambda _: FOUR)
    history = [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": "Hi"}]
    messages = [*history, {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}]
    options: Any = {"resolution": "high", "visual_token_budget": 1, "max_turns": 2, "scale": 0.6}
    reply = create(server, messages=messages, stop="4", extra_body={"vtengine": options})
    assert reply.choices[0].message.content == "" and reply.vtengine["status"] == "answered"
    pieces = ("Be brief.", "Hello", "Hi", "2 + 2?")
    places = [prompt_of(server).index(piece) for piece in pieces]
    assert places == sorted(places)
    cut = create(server, max_tokens=1)
    assert (cut.choices[0].finish_reason, cut.vtengine["status"]) == ("length", "truncated")


def test_an_image_that_comes_later_is_adaptive(serve: Serve) -> None:
    def replies(request: Request) -> str:
        return CALL if len(request.images) == 1 else ANSWER

    messages = [*HELLO, {"role": "assistant", "content": "Hi"}, *ask("What is it?")]
    account = create(serve(replies, profile="vtengine"), messages=messages).vtengine
    assert [[view["kind"] for view in turn["views"]] for turn in account["turns"]] == [["low"], ["high"]]
    assert account["upscaled"] and account["visual_tokens"] == 30


def test_what_is_refused_names_messages(serve: Serve) -> None:
    server = serve(lambda _: FOUR, max_context_tokens=60)
    error = error_of(server, messages=[{"role": "user", "content": "x" * 100}])
    assert (error.status_code, error.code, error.param) == (400, "prompt_too_long", "messages")
    assert error_of(server, messages=[{"role": "user", "content": " "}]).code == "question_missing"
    tool: Any = [*HELLO, {"role": "tool", "content": "4", "tool_call_id": "x"}]
    assert error_of(server, messages=tool).status_code == 400


def test_a_client_that_leaves_cancels_it(serve: Serve) -> None:
    server = serve(lambda _: FOUR, slow=0.05, delay_s=0.5)
    backend: Any = server.backend
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=0.2).chat.completions.create(model=MODEL, messages=HELLO)  # type: ignore[arg-type]
    wait_for(lambda: backend.active == 0 and backend.abandoned == 1)
    stream = create(server, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: backend.active == 0 and backend.abandoned == 2 and server.house.gate.inside == 0)


@contextlib.contextmanager
def over_sglang(tokenizer: Tokenizer) -> Iterator[tuple[Running, FakeSglang]]:
    fake, config = FakeSglang(), config_of(tiny_text(tokenizer.vocab_size), TINY_VISION, byte_encoder(tags=()))
    fake.vocab, fake.image_token, fake.seeded = tokenizer.vocab_size, config.image_token_id, True
    model = ServedModel("tiny", fake.vocab, fake.image_token, config.video_token_id, min_pixels=784, config=config)
    backend = SglangHttpBackend(fake.url, model)
    try:
        with running(make_setting(backend, tokenizer)) as server:
            yield server, fake
    finally:
        fake.close()


def test_over_sglang(tokenizer: Tokenizer) -> None:
    with over_sglang(tokenizer) as (server, fake):
        whole = create(server, seed=3)
        chunks = list(create(server, seed=3, stream=True))
        image = create(server, messages=ask())
    first, second, third = fake.requests
    assert "image_data" not in first and "image_data" not in second and len(third["image_data"]) == 1
    content = whole.choices[0].message.content
    assert content and joined(chunks, "content") == content, "a reply without tags"
    assert (
        whole.vtengine["visual_tokens"] == chunks[-1].vtengine["visual_tokens"] == 0 < image.vtengine["visual_tokens"]
    )
    assert whole.usage.prompt_tokens == len(first["input_ids"])


def test_over_the_embedded_engine(tokenizer: Tokenizer) -> None:
    """Of random weights; beside it a question about an image in the same batch."""
    backend = embedded_backend(tokenizer)
    with running(make_setting(backend, tokenizer)) as server:
        options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "seed": 5}
        alone = create(server, **options)
        image = create(server, messages=ask(), **options)
        again = create(server, **options, stream=True, stream_options={"include_usage": True})
        usage = list(again)[-1].usage
    assert alone.usage.completion_tokens == usage.completion_tokens <= 8
    assert alone.usage.prompt_tokens == usage.prompt_tokens > usage.prompt_tokens_details.cached_tokens > 0
    assert (alone.vtengine["visual_tokens"], image.vtengine["visual_tokens"] > 0) == (0, True)
    assert backend.stats()["images_encoded"] == 1
