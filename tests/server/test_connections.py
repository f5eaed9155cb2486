"""Raw connections: the event stream's bytes, slow and vanishing clients, a stop in the middle, odd bodies."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.running import ANSWER, MODEL, Running, ask, wait_for
from vtengine.server import connection as connection_module
from vtengine.server.config import ServerLimits
from vtengine.server.errors import ApiError
from vtengine.server.schema import parse_chat

Serve = Callable[..., Running]


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def head(length: int) -> bytes:
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json", "Connection: close")
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def send_chat(server: Running, **more: Any) -> socket.socket:
    body = json.dumps({"model": MODEL, "messages": ask(), **more}).encode()
    connection = connect(server)
    connection.sendall(head(len(body)) + body)
    return connection


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(1 << 16):
        data += piece
    return data


def without_sizes(body: bytes) -> bytes:
    """The data of a chunked body."""
    data = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        data, body = data + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return data


def test_bytes_of_the_stream(serve: Serve) -> None:
    odd = "line\nbreak \u2028 \x85 \U0001f600 </script> data: [DONE]"
    raw = read_all(send_chat(serve([f"<think>x</think><answer>{odd}</answer>"]), stream=True))
    header, _, body = raw.partition(b"\r\n\r\n")
    assert b"content-type: text/event-stream" in header and b"cache-control: no-cache" in header
    assert raw.isascii()
    *events, end, nothing = without_sizes(body).split(b"\n\n")
    assert (end, nothing) == (b"data: [DONE]", b"")
    assert all(event.startswith(b"data: ") for event in events)
    events = [json.loads(event[6:]) for event in events]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == odd


def test_silence_is_broken_by_comments(serve: Serve) -> None:
    server = serve(["<answer>ab</answer>"], slow=0.1, limits=ServerLimits(keep_alive_s=0.03))
    raw = read_all(send_chat(server, stream=True))
    assert raw.count(b": keep-alive\n\n") >= 10 and b"data: [DONE]" in raw


def test_a_client_that_leaves_while_it_waits_frees_its_place(serve: Serve) -> None:
    server = serve(held=True, limits=ServerLimits(max_running=1, max_waiting=1))
    first = send_chat(server)
    wait_for(lambda: server.house.gate.running_now == 1)
    second = send_chat(server)
    wait_for(lambda: server.house.gate.waiting == 1)
    second.close()
    wait_for(lambda: server.house.gate.waiting == 0)
    server.backend.released.set()  # type: ignore[attr-defined]
    assert b"a red ball" in read_all(first)
    assert len(server.backend.requests) == 2, "nothing was asked for the one that left"  # type: ignore[attr-defined]


def test_a_client_that_leaves_in_its_body(serve: Serve) -> None:
    server = serve([ANSWER])
    connection = connect(server)
    connection.sendall(head(1000) + b"{")
    wait_for(lambda: server.house.gate.inside == 1)
    connection.close()
    wait_for(lambda: server.house.gate.inside == 0)
    assert server.house.gate.held_bytes == 0


def test_a_body_that_never_ends_meets_the_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "DISCARD_S", 0.3)
    server = serve([ANSWER], limits=ServerLimits(request_timeout_s=0.3))
    connection = connect(server)
    connection.sendall(head(1000) + b"{")
    raw = read_all(connection)
    assert raw.startswith(b"HTTP/1.1 504") and b'"code":"deadline"' in raw


def test_a_stop_in_the_middle_of_a_stream_is_told(serve: Serve) -> None:
    server = serve(slow=0.05)
    connection = send_chat(server, stream=True)
    wait_for(lambda: server.backend.active == 1)  # type: ignore[attr-defined]
    server.stop()
    raw = read_all(connection)
    assert b'"code":"shutting_down"' in raw and b"data: [DONE]" in raw


def test_a_connection_outlives_the_idle_ones_of_proxies(serve: Serve) -> None:
    assert serve([ANSWER]).server.config.timeout_keep_alive > 60


def test_refused_while_it_drains(serve: Serve) -> None:
    server = serve([ANSWER])
    server.house.gate.draining = True
    raw = read_all(send_chat(server))
    assert raw.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in raw and b"shutting_down" in raw


def test_a_server_whose_engine_is_lost_says_so_to_its_keeper(serve: Serve) -> None:
    server = serve([ANSWER])
    paths = ("/health", "/ready")
    assert [httpx.get(server.url + path).status_code for path in paths] == [200, 200]
    server.backend.is_closed = True  # type: ignore[attr-defined]
    for path in paths:
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.json()) == (503, {"status": "the engine is lost"})


def test_requests_after_each_other_on_one_connection(serve: Serve) -> None:
    """A reply that was cut short for one request does not spoil the next."""
    server = serve([ANSWER] * 3)
    client = server.client()
    for _ in range(3):
        assert client.chat.completions.create(model=MODEL, messages=ask()).choices  # type: ignore[arg-type]
        assert client.models.list().data


KEYS = ("role", "content", "type", "text", "url", "image_url", "x")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.just("user"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=8,
)
FIELDS = ("messages", "model", "stream", "stop", "n", "tools", "vtengine", "seed", "max_tokens", "logit_bias", "odd")


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=6), st.booleans())
def test_odd_bodies_are_refused_with_a_name(body: dict[str, Any], is_near: bool) -> None:
    if is_near:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}]} | body
    try:
        parse_chat(json.dumps(body).encode())
    except ApiError as error:
        assert error.status == 400 and error.code and error.message
        assert error.param is None or error.param.isprintable()


@given(st.binary(max_size=200))
def test_bytes_that_are_no_body(data: bytes) -> None:
    with pytest.raises(ApiError):
        parse_chat(data)
