"""What gets no completion: OpenAI's error shape, the field at fault, limits, keys, faults of the engine."""

from __future__ import annotations

import http.client
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.running import ANSWER, MODEL, Running, ask, data_url, image_part, picture, wait_for
from vtengine.engine.base import BackendFailed, RequestRejected
from vtengine.server import connection as connection_module
from vtengine.server.config import ServerLimits
from vtengine.server.keys import ApiKeys

Serve = Callable[..., Running]
USER = {"role": "user", "content": "And?"}
SAID = {"role": "assistant", "content": "a ball"}


def post(server: Running, body: bytes, **headers: str) -> tuple[int, dict[str, Any], Any]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    sent = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request("POST", "/v1/chat/completions", body, sent)
    reply = connection.getresponse()
    data = reply.read()
    return reply.status, dict(reply.getheaders()), json.loads(data)


def error_of(server: Running, stream: bool = False, **options: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().chat.completions.create(**({"model": MODEL, "messages": ask(), "stream": stream} | options))
    return caught.value


BAD_MESSAGES = [
    ([], "messages", "invalid_value"),
    ([*ask(), SAID], "messages", "message_order"),
    ([SAID, *ask()], "messages[0]", "message_order"),
    ([*ask(), {"role": "system", "content": "x"}], "messages[1]", "message_order"),
    (
        [{"role": "user", "content": [image_part(), image_part(data_url(b"")), {"type": "text", "text": "?"}]}],
        "messages[0].content[1].image_url.url",
        "image_empty",
    ),
    ([*ask(), SAID, *ask(url=data_url(b"no"))], "messages[2].content[0].image_url.url", "image_unsupported_format"),
    ([{"role": "user", "content": [image_part()] * 9}], "messages[0].content[8].image_url", "too_many_images"),
    (ask(" "), "messages[0].content", "question_missing"),
    (ask("x" * 100_001), "messages", "text_too_long"),
    (ask(url="cat.png"), "messages[0].content[0].image_url.url", "image_url_not_allowed"),
    (ask(url="/etc/passwd"), "messages[0].content[0].image_url.url", "image_url_not_allowed"),
    (ask(url="file:///etc/passwd"), "messages[0].content[0].image_url.url", "image_url_not_allowed"),
    (ask(url="http://127.0.0.1/x.png"), "messages[0].content[0].image_url.url", "image_url_not_allowed"),
    (ask(url=data_url(b"no image at all")), "messages[0].content[0].image_url.url", "image_unsupported_format"),
    (ask(url=data_url(picture()[:200])), "messages[0].content[0].image_url.url", "image_truncated"),
    (ask(url=data_url(b"")), "messages[0].content[0].image_url.url", "image_empty"),
    (ask(url="data:text/html;base64,AAAA"), "messages[0].content[0].image_url.url", "image_unsupported_format"),
    (ask(url=data_url(picture(size=(1000, 600)))), "messages[0].content[0].image_url.url", "image_too_many_pixels"),
    (ask(url=data_url(b"\x89PNG" * 300_000)), "messages[0].content[0].image_url.url", "image_too_large_bytes"),
    ([{"role": "tool", "content": "x"}], "messages[0].role", "invalid_value"),
    ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type", "invalid_value"),
    (ask(url=3), "messages[0].content[0].image_url.url", "invalid_type"),
    ([*ask(), {"role": "assistant", "tool_calls": [{"id": "1"}]}, USER], "messages[1].tool_calls", "invalid_value"),
]  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> Any:
    """One server for all the refusals that never reach the engine."""
    from tests.server.running import byte_tokenizer, make_setting, running
    from vtengine.engine.scripted import ScriptedBackend

    tokenizer = byte_tokenizer()
    with running(make_setting(ScriptedBackend(tokenizer, lambda _: ANSWER), tokenizer)) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("messages", "param", "code"), BAD_MESSAGES)
def test_bad_messages_name_the_field(plain: Running, messages: Any, param: str, code: str, stream: bool) -> None:
    error = error_of(plain, stream, messages=messages)
    assert (error.status_code, error.code, error.param, error.type) == (400, code, param, "invalid_request_error")
    assert plain.house.gate.inside == 0


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"n": 17}, "n"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"extra_body": {"logprobs": 1}}, "logprobs"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"verbosity": "low"}, "verbosity"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty"),
    ({"extra_body": {"top_k": -2}}, "top_k"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"extra_body": {"best_of": 3}}, "best_of"),
    ({"extra_body": {"vtengine": {"resolution": "medium"}}}, "vtengine.resolution"),
    ({"extra_body": {"vtengine": {"max_turns": 0}}}, "vtengine.max_turns"),
    ({"extra_body": {"vtengine": {"max_turns": 3}}}, "vtengine.max_turns"),
    ({"extra_body": {"vtengine": {"speed": 3}}}, "vtengine.speed"),
    ({"extra_body": {"vtengine": {"scale": 0.5}}}, "vtengine.scale"),
    ({"extra_body": {"vtengine": {"scale": "0.7"}}}, "vtengine.scale"),
    ({"extra_body": {"vtengine": {"visual_token_budget": 5}}}, "vtengine.visual_token_budget"),
]


@pytest.mark.parametrize(("options", "param"), BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_bad_options_name_the_field(plain: Running, options: dict[str, Any], param: str) -> None:
    error = error_of(plain, **options)
    assert error.status_code == 400 and error.param == param and error.body["message"].startswith((param, "the "))  # type: ignore[index]


@pytest.mark.parametrize(
    ("body", "near"),
    [({"max_token": 3}, "max_tokens"), ({"vtengine": {"max_turn": 1}}, "max_turns"), ({"best_of": 3}, None)],
)
def test_unknown_options_are_told_the_nearest(plain: Running, body: dict[str, Any], near: str | None) -> None:
    message = error_of(plain, extra_body=body).body["message"]  # type: ignore[index]
    assert (f"did you mean {near}?" in message) if near else ("did you mean" not in message)


def test_options_that_ask_for_nothing_pass(plain: Running) -> None:
    plain.client().chat.completions.create(
        model=MODEL, messages=ask(), n=1, logprobs=False, tools=[], frequency_penalty=0, user="me", store=False,  # type: ignore[arg-type]
        response_format={"type": "text"}, metadata={"a": "b"}, verbosity="medium", reasoning_effort="medium",
        extra_body={"prompt_cache_options": {"mode": "implicit"}, "top_k": -1, "min_p": 0, "repetition_penalty": 1.0},
    )  # fmt: skip
    assert plain.backend.requests[-1].sampling.top_k == 0  # type: ignore[attr-defined]


def test_habits_of_other_clients_pass(plain: Running) -> None:
    """Advice for a prompt cache, as LiteLLM hands it on, and what OpenAI adds to a part of an answer."""
    messages: Any = ask()
    for part in messages[0]["content"]:
        part["cache_control"], part["prompt_cache_breakpoint"] = {"type": "ephemeral"}, {"mode": "explicit"}
    said = {"role": "assistant", "content": [{"type": "text", "text": "a ball", "annotations": []}]}
    plain.client().chat.completions.create(model=MODEL, messages=[*messages, said, USER])  # type: ignore[list-item]
    request = plain.backend.requests[-1]  # type: ignore[attr-defined]
    assert "a ball" in plain.house.setting.tokenizer.decode(request.token_ids)


def test_unknown_model(plain: Running) -> None:
    error = error_of(plain, model="gpt-4o")
    assert (error.status_code, error.code, error.param) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"", "invalid_json"), (b"{", "invalid_json"), (b"[]", "invalid_type"), (b"\xff", "invalid_json"),
     (b"{}", "missing_required_parameter"),
     (b"[" * 5000, "invalid_json"),
     (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json")],
)  # fmt: skip
def test_bodies_that_are_no_request(plain: Running, body: bytes, code: str) -> None:
    status, headers, reply = post(plain, body)
    assert status == 400 and reply["error"]["code"] == code and "x-request-id" in headers


def test_type_paths_and_methods(plain: Running) -> None:
    assert post(plain, b"{}", content_type="text/plain")[0] == 415
    assert post(plain, b"{}", content_encoding="gzip")[0] == 415
    connection = http.client.HTTPConnection(plain.url.removeprefix("http://"), timeout=20)
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/chat/completions/", 405),
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/embeddings", 404),
        ("GET", "/docs", 404),
    ):
        connection.request(method, path)
        reply = connection.getresponse()
        assert reply.status == status and json.loads(reply.read())["error"]["type"] == "invalid_request_error"
        assert reply.headers["x-request-id"] and (status != 405 or reply.headers["allow"])
    refused = 'vtengine_requests_total{route="/v1/chat/completions",status="405"}'
    wait_for(lambda: plain.metrics()[refused] == 2)  # with a slash at the end too, as some base URLs make it


def test_a_fault_elsewhere_has_an_id_and_is_counted(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve([ANSWER])
    monkeypatch.setattr(type(server.house.metrics), "render", lambda self: 1 / 0)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    connection.request("GET", "/metrics")
    reply = connection.getresponse()
    assert reply.status == 500 and json.loads(reply.read())["error"]["code"] == "internal_error"
    assert reply.headers["x-request-id"]
    monkeypatch.undo()
    wait_for(lambda: server.metrics()['vtengine_requests_total{route="/metrics",status="500"}'] == 1)


def test_body_limit(serve: Serve) -> None:
    server = serve([ANSWER], limits=ServerLimits(max_body_bytes=2000))
    status, _, reply = post(server, b"{" + b" " * 3_000_000)
    assert status == 413 and reply["error"]["code"] == "body_too_large"

    def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1000

    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    connection.request("POST", "/v1/chat/completions", chunks(), {"content-type": "application/json"})
    assert connection.getresponse().status == 413


def test_queue_is_bounded_and_says_when_to_come_back(serve: Serve) -> None:
    server = serve(held=True, limits=ServerLimits(max_running=1, max_waiting=1, retry_after_s=3))
    threads = [
        threading.Thread(target=server.client().chat.completions.create, kwargs={"model": MODEL, "messages": ask()})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: (server.house.gate.running_now, server.house.gate.waiting) == (1, 1))
    error = error_of(server)
    assert (error.status_code, error.code, error.response.headers["retry-after"]) == (429, "queue_full", "3")
    assert isinstance(error, openai.RateLimitError)
    server.backend.released.set()  # type: ignore[attr-defined]
    for thread in threads:
        thread.join(timeout=30)
    wait_for(lambda: server.house.gate.inside == 0)
    assert server.metrics()['vtengine_requests_total{route="/v1/chat/completions",status="429"}'] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_deadline(serve: Serve, stream: bool) -> None:
    server = serve(slow=0.05, delay_s=0 if stream else 5, limits=ServerLimits(request_timeout_s=0.5))
    client = server.client()
    with pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(model=MODEL, messages=ask(), stream=stream))  # type: ignore[call-overload]
    assert caught.value.code == "deadline"
    wait_for(lambda: server.backend.active == 0 and server.house.gate.inside == 0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_episode(serve: Serve, stream: bool) -> None:
    server = serve(slow=0.05, delay_s=0 if stream else 5)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    body = json.dumps({"model": MODEL, "messages": ask(), "stream": stream})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    backend: Any = server.backend
    wait_for(lambda: backend.active == 1)
    assert server.house.gate.inside == 1
    connection.close()
    wait_for(lambda: backend.active == 0 and server.house.gate.inside == 0)
    assert backend.abandoned == 1
    wait_for(lambda: server.metrics()["vtengine_requests_cancelled_total"] == 1)
    assert server.metrics()['vtengine_requests_total{route="/v1/chat/completions",status="499"}'] == 1


def test_closing_the_stream_of_the_client_cancels(serve: Serve) -> None:
    server = serve(slow=0.05)
    stream = server.client().chat.completions.create(model=MODEL, messages=ask(), stream=True)  # type: ignore[arg-type]
    next(iter(stream))
    stream.close()
    wait_for(lambda: server.backend.active == 0 and server.house.gate.inside == 0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [(BackendFailed("broke"), 503, "backend_failed"), (RequestRejected("too_long", "never fits"), 400, "too_long"),
     (KeyError("secret detail"), 500, "internal_error")],
)  # fmt: skip
def test_faults_of_the_engine(serve: Serve, fault: Exception, status: int, code: str, stream: bool) -> None:
    server = serve([fault, fault])
    with pytest.raises(openai.APIError) as caught:
        list(server.client().chat.completions.create(model=MODEL, messages=ask(), stream=stream))  # type: ignore[call-overload]
    assert caught.value.code == code and "secret detail" not in str(caught.value)
    if not stream:
        assert isinstance(caught.value, openai.APIStatusError) and caught.value.status_code == status
    label = "rejected" if status == 400 else "failed"
    assert server.metrics()[f'vtengine_episodes_total{{status="{label}"}}'] == 1


def test_the_engine_may_break_once(serve: Serve) -> None:
    server = serve([BackendFailed("broke"), ANSWER])
    reply = server.client().chat.completions.create(model=MODEL, messages=ask())  # type: ignore[arg-type]
    assert reply.choices[0].message.content == "a red ball"


def test_keys(serve: Serve) -> None:
    server = serve([ANSWER], keys=["first-secret", "second-secret"])
    for key in ("none", "first-secre", "first-secret2", "Bearer first-secret"):
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client(api_key=key).models.list()
        assert caught.value.code == "invalid_api_key" and "secret" not in str(caught.value.body)
    status, headers, _ = post(server, b"{}")
    assert status == 401 and headers["www-authenticate"] == "Bearer"
    assert server.client(api_key="second-secret").models.list().data
    assert server.client(api_key="first-secret").chat.completions.create(model=MODEL, messages=ask()).choices  # type: ignore[arg-type]
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    for path in ("/health", "/ready", "/metrics", "/"):
        connection.request("GET", path)
        reply = connection.getresponse()
        assert reply.status == 200 and reply.read()


def test_keys_from_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfirst-secret\n  second-secret \n")
    monkeypatch.setenv("THE_KEY", "third-secret")
    keys = ApiKeys.load(file, "THE_KEY")
    for key in ("first-secret", "second-secret", "third-secret"):
        keys.check(f"Bearer {key}")
    assert not ApiKeys.load()
    for bad in ("# nothing\n", "short\n", "with a blank\n", "umlaut-ümlaut\n"):
        file.write_text(bad)
        with pytest.raises(ValueError) as caught:
            ApiKeys.load(file)
        assert bad.strip() not in str(caught.value) or bad.startswith("#")
    monkeypatch.delenv("THE_KEY")
    with pytest.raises(ValueError, match="THE_KEY"):
        ApiKeys.load(None, "THE_KEY")


def test_logs_hold_the_id_and_nothing_of_the_contents(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve([ANSWER, KeyError("x")], keys=["first-secret"])
    client = server.client(api_key="first-secret", default_headers={"x-request-id": "my-id.7"})
    image = data_url()
    reply = client.chat.completions.create(model=MODEL, messages=ask("A private question", image))  # type: ignore[arg-type]
    assert reply._request_id == "my-id.7" and reply.id == "chatcmpl-my-id.7"
    for bad in ("data:image/png;base64,c2VjcmV0c2VjcmV0", image):
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(model=MODEL, messages=ask("A private question", bad))  # type: ignore[arg-type]
    post(server, b"{}", authorization="Bearer wrong-secret", x_request_id="evil\tid")
    wait_for(lambda: server.metrics()['vtengine_requests_total{route="/v1/chat/completions",status="401"}'] == 1)
    text = "\n".join(r.getMessage() for r in caplog.records if r.name.startswith(("vtengine", "uvicorn", "starlette")))
    assert "my-id.7 POST /v1/chat/completions 200" in text
    for private in ("secret", "private", "c2VjcmV0", image[30:60], "evil"):
        assert private not in text


def test_memory_of_all_bodies_is_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "DISCARD_S", 60)  # longer than `post` waits: its body is there, is refused
    limits = ServerLimits(max_body_bytes=4000, max_held_bytes=5000)
    server = serve(held=True, limits=limits)
    size = len(json.dumps({"model": MODEL, "messages": ask()}))
    assert 2500 > size > 500
    padded = json.dumps({"model": MODEL, "messages": ask("x" * (3500 - size))}).encode()
    thread = threading.Thread(target=post, args=(server, padded))
    thread.start()
    wait_for(lambda: server.house.gate.running_now == 1)
    status, headers, reply = post(server, padded)
    assert (status, reply["error"]["code"]) == (429, "queue_full") and "retry-after" in headers
    server.backend.released.set()  # type: ignore[attr-defined]
    thread.join()
    wait_for(lambda: server.house.gate.held_bytes == 0)
    assert post(server, padded)[0] == 200
