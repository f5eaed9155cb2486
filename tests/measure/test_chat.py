"""A chat server as its clients see it: our own application, and a server with faults."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.server.conftest import serve as serve  # the fixture
from tests.server.conftest import tokenizer as tokenizer
from vtengine.measure.chat import ChatFailed, ChatServer
from vtengine.measure.load import Row

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)
USAGE = {"prompt_tokens": 40, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}


def event(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: " + json.dumps({"choices": choices} | more).encode() + b"\n\n"


WORDS = [event({"role": "assistant"}), event({"content": "4"}), event({"content": "2\u2028"}), event({}, "stop")]
DONE = b"data: [DONE]\n\n"


class Faulty(BaseHTTPRequestHandler):
    """Answers with the bytes in `pieces`, a pause before each."""

    protocol_version = "HTTP/1.1"
    status, pieces, pause_s, wrong_length = 200, list[bytes](), 0.0, False
    seen: list[dict[str, Any]]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, json.dumps({"object": "list", "data": [{"id": "a"}, {"id": "b"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append({"path": self.path, "key": self.headers.get("Authorization"), "body": body})
        if self.status != 200:
            return self._send(self.status, b'{"error": {"message": "no room"}}')
        self.send_response(200)
        self.send_header("Content-Length", str(sum(map(len, self.pieces)) + self.wrong_length))
        self.end_headers()
        for piece in self.pieces:
            time.sleep(self.pause_s)
            self.wfile.write(piece)
        self.close_connection = True

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def faulty() -> Iterator[Callable[..., tuple[str, list[dict[str, Any]]]]]:
    """Starts it; returns its base URL and what it is asked."""
    servers = []

    def start(**how: Any) -> tuple[str, list[dict[str, Any]]]:
        handler = type("Handler", (Faulty,), how | {"seen": []})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/v1", handler.seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answer(
    url: str, question: str = "What?", model: str | None = None, deadline_s: float | None = 30.0, **options: Any
) -> Row:
    async def go() -> Row:
        server = ChatServer(url, model, "secret", options, deadline_s)
        try:
            await server.find_model()
            return await server.answer("q", server.body(question, PNG, "high"))
        finally:
            server.close()

    return asyncio.run(go())


def test_our_own_server(serve: Callable[..., Any]) -> None:
    """Two turns: the account is the server's, the times are the client's."""
    server = serve(delay_s=0.05)
    row = answer(f"{server.url}/v1", max_tokens=512)
    assert row["status"] == "answered" and row["error"] is None
    assert row["upscaled"] is False, "the whole image was asked for"
    (turn,) = row["turns"]
    assert turn["cached_tokens"] + turn["prefill_tokens"] == turn["prompt_tokens"] > 0
    assert turn["completion_tokens"] > 0 and turn["images"][0]["encoded"] is True
    assert 0.05 <= turn["ttft_s"] <= turn["latency_s"] == row["latency_s"]
    assert row["visual_tokens"] == row["visual_tokens_full"] > 0


def test_what_is_sent_and_read(faulty: Callable[..., Any]) -> None:
    url, seen = faulty(pieces=[*WORDS, event(usage=USAGE), DONE], pause_s=0.02)
    row = answer(url, "How much?", max_tokens=7, temperature=0.0)
    assert seen[0]["path"] == "/v1/chat/completions" and seen[0]["key"] == "Bearer secret"
    body = seen[0]["body"]
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["detail"] == "high" and image["image_url"]["url"].startswith(
        "data:image/png;base64,iVBOR"
    )
    assert text["text"] == "How much?" and body["model"] == "a" and body["max_tokens"] == 7 and body["stream"] is True
    assert row["answer"] == "42\u2028", "a line separator inside of JSON ends no event"
    (turn,) = row["turns"]
    assert (turn["prompt_tokens"], turn["cached_tokens"], turn["completion_tokens"]) == (40, 8, 3)
    assert 0.04 <= turn["ttft_s"] < turn["latency_s"] - 0.04, "the first text, not the role before it"
    assert answer(url, model="b")["status"] == "answered" and seen[-1]["body"]["model"] == "b"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_is_the_first_token_and_not_the_answer(faulty: Callable[..., Any], key: str) -> None:
    pieces = [event({key: "hm"}), event({"content": "yes"}), event({}, "length"), event(usage=USAGE), DONE]
    row = answer(faulty(pieces=pieces, pause_s=0.03)[0])
    assert row["answer"] == "yes" and row["status"] == "truncated"
    assert row["turns"][0]["ttft_s"] < 0.09


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({"status": 429}, "http_429"),
        ({"pieces": WORDS[:2]}, "connection_lost"),
        ({"pieces": WORDS[:2], "wrong_length": True}, "connection_lost"),
        ({"pieces": [*WORDS, DONE]}, "reply_invalid"),
        ({"pieces": [b"data: {nonsense\n\n"]}, "reply_invalid"),
        ({"pieces": [b"data: [1, 2]\n\n"]}, "reply_invalid"),
        ({"pieces": [event(error={"message": "lost its GPU"})]}, "server_error"),
        ({"pieces": [b"data: " + b"[" * 200_000 + b"\n\n"]}, "reply_invalid"),
    ],
)
def test_faults_are_rows(faulty: Callable[..., Any], how: dict[str, Any], code: str) -> None:
    row = answer(faulty(**how)[0])
    assert row["status"] == "failed" and row["error"]["code"] == code and row["turns"] == []


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


@pytest.fixture
def raw() -> Iterator[Callable[..., str]]:
    """A server that answers a question with these bytes, head and all; returns its base URL."""
    servers = []

    def start(reply: bytes) -> str:
        def do_post(self: Faulty) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(reply)
            self.close_connection = True

        handler = type("Handler", (Faulty,), {"do_POST": do_post, "seen": []})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


GREEN = [
    b'data: {"choices": [{"delta": {"content": "gr\xc3\xbcn"}}]}\r\n\r\n: ping\r\n\r\n',
    event({}, "stop"),
    event(usage=USAGE),
]
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "reply",
    [
        CHUNKED + chunked(*(bytes([one]) for one in b"".join(GREEN))),  # in "data:" and within a character
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + CHUNKED + chunked(*GREEN, end=b"0\r\nx-trailer: 1\r\n\r\n"),
        CHUNKED + chunked(b": " + b"x" * 300_000 + b"\n\n" + b"".join(GREEN)),  # more than a reader keeps
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + b"".join(GREEN),
        b"HTTP/1.0 200 OK\r\n\r\n" + b"".join(GREEN),
    ],
)
def test_ways_to_send_a_stream(raw: Callable[..., str], reply: bytes) -> None:
    row = answer(raw(reply))
    assert (row["status"], row["answer"]) == ("answered", "gr\u00fcn"), row["error"]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (CHUNKED + chunked(*GREEN[:1], end=b""), "closed in the middle of the reply"),
        (CHUNKED + b"20\r\ndata:", "closed in the middle of the reply"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ndata:", "closed in the middle of the reply"),
        (b"", "closed before the reply came"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n", "is no HTTP/1.1"),
        (b"SSH-2.0\r\n\r\n", "is no HTTP/1.1"),
        (CHUNKED + b"-5\r\n", "is no HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"x" * 200_000, "is no HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\n", "the reply is packed"),
    ],
)
def test_a_connection_that_fails_is_told_of(raw: Callable[..., str], reply: bytes, words: str) -> None:
    row = answer(raw(reply))
    assert row["error"]["code"] == "connection_lost" and words in row["error"]["message"]


def test_a_reply_that_never_ends_has_failed(faulty: Callable[..., Any]) -> None:
    row = answer(faulty(pieces=[WORDS[1]] * 40, pause_s=0.05)[0], deadline_s=0.3)
    assert row["error"] == {"code": "deadline_exceeded", "message": "not done after 0.3 s (--deadline-s)"}
    assert 0.3 <= row["latency_s"] < 1.5


def test_connections_are_kept(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    async def go() -> None:
        server, connect = ChatServer(f"{serve().url}/v1", None, None, {}, 30.0), asyncio.open_connection
        monkeypatch.setattr(asyncio, "open_connection", lambda *a, **k: (opened.append(a), connect(*a, **k))[1])
        await server.find_model()
        for _ in range(3):
            row = await server.answer("q", server.body("What?", PNG, "high"))
            assert row["status"] == "answered"
        server.close()

    asyncio.run(go())
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("url", "key", "words"),
    [
        ("127.0.0.1:8000/v1", None, "is no http://"),
        ("http:///v1", None, "is no http://"),
        ("http://a", "k\n", "key"),
    ],
)
def test_an_address_or_a_key_that_cannot_be_one(url: str, key: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ChatServer(url, None, key, {}, None)


@pytest.mark.parametrize("usage", [{"prompt_tokens": "many", "completion_tokens": -3}, {"prompt_tokens": True, "x": 1}])
def test_odd_usage_counts_as_nothing(faulty: Callable[..., Any], usage: dict[str, Any]) -> None:
    pieces = [*WORDS, event(usage=usage), event(vtengine={"turns": "none", "visual_tokens": []}), DONE]
    (turn,) = answer(faulty(pieces=pieces)[0])["turns"]
    assert (turn["prompt_tokens"], turn["completion_tokens"], turn["images"]) == (0, 0, [])


@pytest.mark.parametrize(("model", "words"), [("c", "has no model c; it has a, b"), (None, "does not list its models")])
def test_a_server_that_is_not_there_or_has_another_model(
    faulty: Callable[..., Any], model: str | None, words: str
) -> None:
    url = faulty()[0] if model else "http://127.0.0.1:9/v1"
    with pytest.raises(ChatFailed, match=words):
        answer(url, model=model)
