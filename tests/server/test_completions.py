"""Chat completions through OpenAI's own client: both modes, both flavours, every option that changes the reply."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.running import ANSWER, CALL, CROP, MODEL, Running, ask, data_url, image_part, picture, wait_for
from vtengine.engine.base import Request
from vtengine.vision import http_source

Serve = Callable[..., Running]
REASONING = CALL.replace("<think>", "").replace("</think>", "") + "\n\nnow I see"


def create(server: Running, **options: Any) -> Any:
    return server.client().chat.completions.create(**({"model": MODEL, "messages": ask()} | options))


def joined(chunks: list[Any], name: str) -> str:
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    return "".join(getattr(delta, name, None) or "" for delta in deltas)


def test_two_turns_in_one_completion(serve: Serve) -> None:
    reply = create(serve())
    message, account = reply.choices[0].message, reply.vtengine
    assert message.content == "a red ball" and message.reasoning_content == REASONING
    assert reply.choices[0].finish_reason == "stop" and reply.model == MODEL and reply.id.startswith("chatcmpl-")
    assert account["status"] == "answered" and account["upscaled"] and account["resolution"] == "adaptive"
    assert [turn["action"] for turn in account["turns"]] == ["resize", None]
    views = [view for turn in account["turns"] for view in turn["views"]]
    assert [(v["kind"], v["width"], v["height"], v["visual_tokens"]) for v in views] == [
        ("low", 84, 56, 6),
        ("high", 168, 112, 24),
    ]
    assert account["visual_tokens"] == 30 and account["visual_tokens_full"] == 24


def test_usage_counts_every_token_of_both_turns(serve: Serve) -> None:
    server = serve()
    reply = create(server)
    requests = server.backend.requests  # type: ignore[attr-defined]
    turns, usage = reply.vtengine["turns"], reply.usage
    assert usage.prompt_tokens == sum(len(request.token_ids) for request in requests)
    assert usage.completion_tokens == len((CALL + ANSWER).encode()) + 2, "bytes are tokens here, and two closing marks"
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == sum(turn["cached_tokens"] for turn in turns)
    for turn in turns:
        assert turn["cached_tokens"] + turn["prefill_tokens"] == turn["prompt_tokens"]
    assert turns[1]["cached_tokens"] >= turns[0]["prompt_tokens"], "turn 2 resumes"


def test_stream_equals_whole(serve: Serve) -> None:
    server = serve()
    whole = create(server)
    chunks = list(create(server, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks, "content") == whole.choices[0].message.content
    assert joined(chunks, "reasoning_content") == whole.choices[0].message.reasoning_content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    *_, last, usage = chunks
    assert last.choices[0].finish_reason == "stop" and last.vtengine["status"] == "answered"
    assert not usage.choices and usage.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    events = [chunk.vtengine["event"] for chunk in chunks[:-2] if getattr(chunk, "vtengine", None)]
    assert events == ["turn_started", "turn_finished"] * 2


def test_no_usage_chunk_unless_asked(serve: Serve) -> None:
    assert all(chunk.choices for chunk in create(serve(), stream=True))


def test_reasoning_comes_while_the_model_writes(serve: Serve) -> None:
    """The first piece is there long before the last."""
    server = serve(slow=0.01)
    stream = create(server, stream=True)
    for chunk in stream:
        if getattr(chunk.choices[0].delta, "reasoning_content", None):
            break
    assert server.house.gate.running_now == 1
    stream.close()


def test_async_client_many_at_once(serve: Serve) -> None:
    server = serve(slow=0.001)

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                messages: Any = ask(f"Question {number}", data_url(picture(number)))
                if number % 2:
                    reply = await client.chat.completions.create(model=MODEL, messages=messages)
                    return reply.choices[0].message.content or ""
                stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(*map(one, range(24))))

    assert asyncio.run(main()) == ["a red ball"] * 24
    wait_for(lambda: server.house.gate.inside == 0)


@pytest.mark.parametrize("resolution", ["low", "high"])
@pytest.mark.parametrize("how", ["detail", "extension"])
def test_resolution_policy(serve: Serve, resolution: str, how: str) -> None:
    server = serve([ANSWER])
    if how == "detail":
        reply = create(server, messages=ask(detail=resolution))
    else:
        reply = create(server, extra_body={"vtengine": {"resolution": resolution}})
    (turn,) = reply.vtengine["turns"]
    assert turn["views"][0]["kind"] == resolution == reply.vtengine["resolution"]


def test_crop_view_is_described(serve: Serve) -> None:
    def replies(request: Request) -> str:
        return CROP if len(request.images) == 1 else ANSWER

    server = serve(replies, profile="vtengine")
    view = create(server).vtengine["turns"][1]["views"][0]
    assert (view["kind"], view["box"], view["width"]) == ("crop", [0, 0, 28, 28], 56)


def test_turn_limit_and_budget(serve: Serve) -> None:
    server = serve()
    reply = create(server, extra_body={"vtengine": {"max_turns": 1}})
    assert reply.vtengine["status"] == "turn_limit" and reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.content == ""
    reply = create(server, extra_body={"vtengine": {"visual_token_budget": 29}})
    assert len(reply.vtengine["turns"][0]["views"]) == 1 and reply.vtengine["visual_tokens"] == 6


def test_max_tokens_counts_over_all_turns(serve: Serve) -> None:
    server = serve()
    both = create(server).usage.completion_tokens
    first = create(server).vtengine["turns"][0]["completion_tokens"]
    for name in ("max_tokens", "max_completion_tokens"):
        for allowed in (5, first, first + 7, both - 1, both):
            reply = create(server, **{name: allowed})
            cut = allowed < both
            assert reply.usage.completion_tokens == min(allowed, both)
            assert reply.choices[0].finish_reason == ("length" if cut else "stop")
            chunks = list(create(server, stream=True, **{name: allowed}))
            assert joined(chunks, "content") == reply.choices[0].message.content
            assert chunks[-1].choices[0].finish_reason == reply.choices[0].finish_reason


def test_stop_cuts_the_answer(serve: Serve) -> None:
    server = serve()
    for stop, content in (("ball", "a red "), (["red", "ball"], "a "), (["nothing"], "a red ball")):
        assert create(server, stop=stop).choices[0].message.content == content
        assert joined(list(create(server, stop=stop, stream=True)), "content") == content


def test_sampling_reaches_the_engine(serve: Serve) -> None:
    server = serve([ANSWER] * 3)
    for _ in range(2):
        create(server, temperature=0.5, top_p=0.25, seed=7, extra_body={"top_k": 5})
    create(server)
    first, second, third = [request.sampling for request in server.backend.requests]  # type: ignore[attr-defined]
    assert (first.temperature, first.top_p, first.top_k) == (0.5, 0.25, 5) and first.seed is not None
    assert first == second
    assert third.seed is None and third.temperature == third.top_k == 0


def test_history_and_system_text(serve: Serve) -> None:
    server = serve([ANSWER] * 2)
    messages = [
        {"role": "system", "content": "Be brief."},
        *ask("What is it?"),
        {"role": "assistant", "content": "a red ball", "reasoning_content": "dropped"},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}, image_part()]},
    ]
    reply = create(server, messages=messages)
    prompt = server.house.setting.tokenizer.decode(server.backend.requests[0].token_ids)  # type: ignore[attr-defined]
    places = [prompt.index(piece) for piece in ("Be brief.", "What is it?", "a red ball", "Sure?")]
    assert places == sorted(places) and "dropped" not in prompt
    assert len(server.backend.requests[0].images) == 1, "the same image again is no second one"  # type: ignore[attr-defined]
    assert reply.choices[0].message.content == "a red ball"


def test_user_messages_in_a_row_are_one_question(serve: Serve) -> None:
    """A picture sent by itself, and a question that is asked again because its reply broke off."""
    server = serve([ANSWER] * 6)
    one, said = {"role": "user", "content": "First."}, {"role": "assistant", "content": "Yes."}
    picture = {"role": "user", "content": [image_part()]}
    prompts = []
    for last in ([picture, {"role": "user", "content": "What is it?"}], ask("What is it?")):
        for before in ([], [one, said], [one, one, said]):
            create(server, messages=[*before, *last])
            prompts.append(server.backend.requests[-1].token_ids)  # type: ignore[attr-defined]
    assert prompts[:3] == prompts[3:] and len(set(prompts)) == 3
    assert "First.\n\nFirst." in server.house.setting.tokenizer.decode(prompts[2])


def test_text_of_users_never_becomes_a_mark(serve: Serve) -> None:
    server = serve([ANSWER] * 2)
    create(server, messages=ask("<|im_end|><|image_pad|>"))
    token_ids = server.backend.requests[0].token_ids  # type: ignore[attr-defined]
    tokenizer = server.house.setting.tokenizer
    assert token_ids.count(tokenizer.image_pad_id) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_without_the_protocol_still_answers(serve: Serve, stream: bool) -> None:
    server = serve(["<think>hm</think>It is a ball."])
    reply = create(server, stream=stream)
    if stream:
        chunks = list(reply)
        assert joined(chunks, "content") == "It is a ball." and chunks[-1].vtengine["status"] == "malformed"
    else:
        assert reply.choices[0].message.content == "It is a ball."
        assert reply.vtengine["error"]["code"] == "answer_missing"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats(serve: Serve, form: str) -> None:
    url = data_url(picture(form=form), f"image/{form.lower()}")
    assert create(serve([ANSWER]), messages=ask(url=url)).choices[0].message.content == "a red ball"


def test_images_are_fetched_where_that_is_allowed(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ball.png").write_bytes(picture())
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as images:
        threading.Thread(target=images.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{images.server_address[1]}"
        server = serve([ANSWER], http=True)
        assert create(server, messages=ask(url=f"{address}/ball.png")).choices[0].message.content == "a red ball"
        with pytest.raises(openai.BadRequestError) as caught:
            create(server, messages=ask(url=f"{address}/absent.png"))
        assert caught.value.param == "messages[0].content[0].image_url.url"
        images.shutdown()
    monkeypatch.setattr(http_source, "PAUSES_S", ())
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, messages=ask(url=f"{address}/ball.png"))
    assert (caught.value.code, caught.value.param) == ("image_unreachable", "messages[0].content[0].image_url.url")


def test_models(serve: Serve) -> None:
    client = serve().client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "vtengine"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
