"""Several images in a request and in its history, and the scale of views, through OpenAI's client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.running import ANSWER, CALL, MODEL, Running, ask, data_url, image_part, picture
from tests.server.test_refusals import error_of
from vtengine.engine.base import Request
from vtengine.server.config import ServerLimits

Serve = Callable[..., Running]
RED, BLUE = data_url(picture(0)), data_url(picture(9, size=(224, 112)))
BOTH = [{"role": "user", "content": [image_part(RED), {"type": "text", "text": "Which?"}, image_part(BLUE)]}]
ONE_OF = (
    '<think>b</think><tool_call>{"name": "resize_image", "arguments": {"action": "resize", "image": 2}}</tool_call>'
)


def create(server: Running, **options: Any) -> Any:
    return server.client().chat.completions.create(**({"model": MODEL, "messages": BOTH} | options))


def calls_once(call: str, first: int) -> Callable[[Request], str]:
    return lambda request: call if len(request.images) == first else ANSWER


def views(turn: dict[str, Any]) -> list[tuple[str, int, int]]:
    return [(view["kind"], view["image"], view["visual_tokens"]) for view in turn["views"]]


@pytest.mark.parametrize("stream", [False, True])
def test_both_low_first_then_both_high(serve: Serve, stream: bool) -> None:
    server = serve(calls_once(CALL, 2), profile="vtengine")
    reply = create(server, stream=stream)
    if stream:
        chunks = list(reply)
        account = chunks[-1].vtengine
        started = [c.vtengine for c in chunks if getattr(c, "vtengine", {}).get("event") == "turn_started"]
        assert [views(event) for event in started] == [views(turn) for turn in account["turns"]]
    else:
        account = reply.vtengine
        assert reply.choices[0].message.content == "a red ball"
    assert views(account["turns"][0]) == [("low", 0, 6), ("low", 1, 8)]
    assert views(account["turns"][1]) == [("high", 0, 24), ("high", 1, 32)]
    assert account["visual_tokens"] == 70 and account["visual_tokens_full"] == 56 and account["upscaled"]
    prompt = server.house.setting.tokenizer.decode(server.backend.requests[0].token_ids)  # type: ignore[attr-defined]
    assert prompt.index("Picture 1") < prompt.index("Picture 2") < prompt.index("Which?")


def test_the_model_may_look_at_one_of_them(serve: Serve) -> None:
    account = create(serve(calls_once(ONE_OF, 2), profile="vtengine")).vtengine
    assert views(account["turns"][1]) == [("high", 1, 32)] and account["visual_tokens"] == 46


def test_images_in_the_history_stay_in_their_turns(serve: Serve) -> None:
    server = serve(lambda _: ANSWER, profile="vtengine")
    messages = [*ask("First?", RED), {"role": "assistant", "content": "Scarlet"}, *ask("Second?", BLUE)]
    reply = create(server, messages=messages)
    request = server.backend.requests[0]  # type: ignore[attr-defined]
    tokenizer = server.house.setting.tokenizer
    prompt = tokenizer.decode(request.token_ids)
    pieces = ("Picture 1", "First?", "Scarlet", "Picture 2", "Second?")
    assert [prompt.index(piece) for piece in pieces] == sorted(prompt.index(piece) for piece in pieces)
    assert [image.visual_tokens for image in request.images] == [6, 8]
    assert request.token_ids.count(tokenizer.image_pad_id) == 14
    assert views(reply.vtengine["turns"][0]) == [("low", 0, 6), ("low", 1, 8)]


def test_an_image_that_comes_later(serve: Serve) -> None:
    server = serve(lambda _: ANSWER, profile="vtengine")
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, *ask("What is it?", RED)]
    assert create(server, messages=messages).choices[0].message.content == "a red ball"
    prompt = server.house.setting.tokenizer.decode(server.backend.requests[0].token_ids)  # type: ignore[attr-defined]
    assert prompt.index("Hello") < prompt.index("Picture 1") < prompt.index("What is it?")


def test_one_image_has_the_plain_prompt_however_often_it_is_sent(serve: Serve) -> None:
    server = serve(lambda _: ANSWER, profile="vtengine")
    create(server, messages=ask("What?", RED))
    content = [image_part(RED), image_part(RED), {"type": "text", "text": "What?"}]
    create(server, messages=[{"role": "user", "content": content}])
    one, again = server.backend.requests  # type: ignore[attr-defined]
    assert one.token_ids == again.token_ids


@pytest.mark.parametrize(
    ("details", "resolution"), [("hh", "high"), ("ll", "low"), ("hl", "adaptive"), ("h-", "adaptive")]
)
def test_detail_counts_where_all_images_agree(serve: Serve, details: str, resolution: str) -> None:
    names = {"h": {"detail": "high"}, "l": {"detail": "low"}, "-": {}}
    parts = [image_part(url, **names[one]) for url, one in zip((RED, BLUE), details, strict=True)]
    content = [*parts, {"type": "text", "text": "Which?"}]
    reply = create(serve(lambda _: ANSWER, profile="vtengine"), messages=[{"role": "user", "content": content}])
    assert reply.vtengine["resolution"] == resolution


def test_one_budget_for_all_images(serve: Serve) -> None:
    server = serve(calls_once(CALL, 2), profile="vtengine")
    error = error_of(server, messages=BOTH, extra_body={"vtengine": {"visual_token_budget": 13}})
    assert (error.code, error.param) == ("visual_budget_too_small", "vtengine.visual_token_budget")
    account = create(server, extra_body={"vtengine": {"visual_token_budget": 69}}).vtengine
    assert views(account["turns"][0]) == [("low", 0, 6), ("low", 1, 8)] and account["visual_tokens"] == 14


def test_many_images_have_a_limit(serve: Serve) -> None:
    server = serve(limits=ServerLimits(max_images=1), profile="vtengine")
    error = error_of(server, messages=BOTH)
    assert (error.code, error.param) == ("too_many_images", "messages[0].content[2].image_url")


def test_scale_bounds_the_closer_view(serve: Serve) -> None:
    server = serve(calls_once(CALL, 1), profile="vtengine")
    big = ask(url=data_url(picture(size=(560, 560))))
    view = create(server, messages=big, extra_body={"vtengine": {"scale": 0.7}}).vtengine["turns"][1]["views"][0]
    assert (view["kind"], view["scale"], view["width"], view["height"]) == ("scale", 0.7, 392, 392)
    plain = create(server, messages=big).vtengine
    assert views(plain["turns"][1]) == [("high", 0, 400)]
    high = create(server, messages=big, extra_body={"vtengine": {"scale": 0.7, "resolution": "high"}}).vtengine
    assert views(high["turns"][0]) == [("scale", 0, 196)] and high["visual_tokens_full"] == 400


def test_a_request_may_lower_the_scale_but_not_raise_it(serve: Serve) -> None:
    server = serve(calls_once(CALL, 1), profile="vtengine", scale=0.8)
    error = error_of(server, extra_body={"vtengine": {"scale": 0.9}})
    assert error.param == "vtengine.scale" and "at most 0.8" in str(error)
    views_ = create(server, messages=ask(), extra_body={"vtengine": {"scale": 0.6}}).vtengine["turns"][1]["views"]
    assert views_[0]["scale"] == 0.6
