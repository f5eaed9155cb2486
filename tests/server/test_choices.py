"""Several choices (`n`): whole and streamed, seeds, limits, what they share, faults and clients that leave."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.server.running import (
    ANSWER,
    CALL,
    MODEL,
    Running,
    ask,
    embedded_backend,
    make_setting,
    running,
    two_turns,
    wait_for,
)
from tests.server.test_connections import read_all, send_chat
from tests.server.test_refusals import error_of
from vtengine.engine.base import BackendFailed, Request
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.server.config import ServerLimits

Serve = Callable[..., Running]


def create(server: Running, **options: Any) -> Any:
    return server.client().chat.completions.create(**({"model": MODEL, "messages": ask()} | options))


def by_seed(request: Request) -> str:
    """Every second choice answers after a closer look; the answers differ."""
    seed = request.sampling.seed or 0
    return CALL if len(request.images) == 1 and seed % 2 else f"<think>t{seed}</think><answer>answer {seed}</answer>"


def test_choices_of_a_whole_reply(serve: Serve) -> None:
    server = serve(by_seed)
    reply = create(server, n=6, seed=3)
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert len({choice.message.content for choice in reply.choices}) == 6
    accounts = [choice.vtengine for choice in reply.choices]
    assert {account["upscaled"] for account in accounts} == {False, True}
    assert reply.vtengine["choices"] == 6
    for name in ("visual_tokens", "cached_tokens", "prefill_tokens", "completion_tokens"):
        assert reply.vtengine[name] == sum(account[name] for account in accounts)
    requests = server.backend.requests  # type: ignore[attr-defined]
    assert reply.usage.prompt_tokens == sum(len(request.token_ids) for request in requests)
    assert reply.usage.completion_tokens == reply.vtengine["completion_tokens"]
    assert reply.usage.prompt_tokens_details.cached_tokens == reply.vtengine["cached_tokens"]


def test_siblings_share_the_prompt(serve: Serve) -> None:
    server = serve(lambda _: ANSWER)
    turns = [choice.vtengine["turns"][0] for choice in create(server, n=5).choices]
    first, *others = sorted(turn["cached_tokens"] for turn in turns)
    assert first < turns[0]["prompt_tokens"] - 1 and set(others) == {turns[0]["prompt_tokens"] - 1}
    assert sum(turn["views"][0]["encoded"] for turn in turns) == 1


def test_streamed_choices_equal_whole_ones(serve: Serve) -> None:
    whole = create(serve(by_seed), n=3, seed=4)
    server = serve(by_seed)
    chunks = list(create(server, n=3, seed=4, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert not last.choices and last.usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1, 2}
    for choice in whole.choices:
        mine = [chunk for chunk in chunks if chunk.choices[0].index == choice.index]
        deltas = [chunk.choices[0].delta for chunk in mine]
        assert "".join(delta.content or "" for delta in deltas) == choice.message.content
        reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        assert reasoning == choice.message.reasoning_content
        assert mine[0].choices[0].delta.role == "assistant" and mine[-1].choices[0].finish_reason == "stop"
        assert mine[-1].vtengine["status"] == "answered"
    wait_for(lambda: server.house.gate.inside == 0)
    assert server.house.gate.waiting == server.house.gate.running_now == 0


def test_choices_interleave_while_they_are_written(serve: Serve) -> None:
    chunks = create(serve(slow=0.01), n=2, stream=True)
    order = [chunk.choices[0].index for chunk in chunks if getattr(chunk.choices[0].delta, "reasoning_content", None)]
    assert order.index(1) < len(order) - 1 - order[::-1].index(0)


def test_seeds_of_choices(serve: Serve) -> None:
    server = serve(lambda _: ANSWER)

    def seeds(**options: Any) -> list[int | None]:
        done = len(server.backend.requests)  # type: ignore[attr-defined]
        create(server, temperature=1, **options)
        return sorted(request.sampling.seed or 0 for request in server.backend.requests[done:])  # type: ignore[attr-defined]

    three = seeds(n=3, seed=7)
    assert len(set(three)) == 3 and seeds(n=3, seed=7) == three
    assert set(seeds(n=1, seed=7)) < set(three), "the first choice is the only one of n = 1"
    assert seeds(n=3) == [0, 0, 0], "the engine draws them"


def test_limits_count_choices(serve: Serve) -> None:
    server = serve(held=True, limits=ServerLimits(max_running=2, max_waiting=2))
    assert error_of(server, n=5).param == "n"
    first = send_chat(server, n=3)
    wait_for(lambda: server.house.gate.running_now == 2)
    assert server.house.gate.waiting == 1 and server.house.gate.inside == 1
    full = error_of(server, n=2)
    assert (full.status_code, full.code) == (429, "queue_full")
    server.backend.released.set()  # type: ignore[attr-defined]
    assert b"a red ball" in read_all(first)
    assert len(create(server, n=4).choices) == 4


def test_max_tokens_bounds_each_choice(serve: Serve) -> None:
    reply = create(serve(), n=2, max_tokens=5)
    assert [choice.finish_reason for choice in reply.choices] == ["length"] * 2
    assert reply.usage.completion_tokens == 10


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_fails_fails_the_request(serve: Serve, stream: bool) -> None:
    numbers = itertools.count()

    def reply(request: Request) -> Any:
        if next(numbers) >= 2:
            return BackendFailed("gone")
        return two_turns(request)

    server = serve(reply)
    with pytest.raises(openai.APIError) as caught:
        answer = create(server, n=3, stream=stream)
        for _ in answer if stream else ():
            pass
    assert caught.value.code == "backend_failed"
    wait_for(lambda: server.house.gate.inside == 0)
    assert server.house.gate.running_now == server.house.gate.waiting == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_all(serve: Serve, stream: bool) -> None:
    server = serve(slow=0.05, delay_s=0 if stream else 5, limits=ServerLimits(max_running=2))
    connection = send_chat(server, n=3, stream=stream)
    wait_for(lambda: server.house.gate.running_now == 2)
    connection.close()
    wait_for(lambda: server.house.gate.inside == 0)
    assert server.house.gate.running_now == server.house.gate.waiting == 0
    assert server.backend.active == 0  # type: ignore[attr-defined]


def test_the_embedded_engine_computes_the_prompt_of_siblings_once(tokenizer: Tokenizer) -> None:
    """A model of random weights: all but one sibling find every full page of the prompt."""
    backend = embedded_backend(tokenizer)
    with running(make_setting(backend, tokenizer)) as server:
        reply = create(server, n=4, temperature=1.0, seed=3, max_tokens=8)
        turns = [choice.vtengine["turns"][0] for choice in reply.choices]
        cached = sorted(turn["cached_tokens"] for turn in turns)
        assert cached[0] < cached[1] == cached[3] and turns[0]["prompt_tokens"] - cached[1] <= backend.pool.page_size
        assert sum(turn["views"][0]["encoded"] for turn in turns) == 1
    asyncio.run(backend.close())
