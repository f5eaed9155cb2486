"""A local endpoint that speaks chat completions, with faults on order. Standard library only."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Act = Callable[["Asked"], "Action"]


class Asked:
    """What a judge sees: the request, its number from 0, and the parts of the prompt, read line by line."""

    def __init__(self, number: int, body: dict[str, Any]) -> None:
        self.number, self.body = number, body
        self.user: str = body["messages"][-1]["content"]
        lines = self.user.split("\n")
        self.fence = next(line for line in lines if line.startswith("=====FENCE"))
        first = lines.index(self.fence)
        last = lines.index(self.fence, first + 1)
        self.candidate: str = json.loads("\n".join(lines[first + 1 : last]))
        self.outside = "\n".join(lines[:first] + lines[last + 1 :])
        self.question: str = json.loads(lines[0].removeprefix("Question: "))
        self.references: list[str] = json.loads(lines[1].removeprefix("References: "))
        keys = re.findall(r"^Key: ([0-9a-f]{8})$", "\n".join(lines[last + 1 :]), re.MULTILINE)
        assert len(keys) == 1
        self.key = keys[0]

    def verdict(self, correct: bool) -> Action:
        return say(f"{self.key} {'CORRECT' if correct else 'INCORRECT'}")


class Action:
    def __init__(self, body: bytes = b"", status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.body, self.status, self.headers = body, status, headers or {}
        self.wait_s, self.drops, self.cut = 0.0, False, False


def say(text: Any, finish: str = "stop", prompt_tokens: int = 100, completion_tokens: int = 5) -> Action:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return Action(json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode())


def status(code: int, **headers: str) -> Action:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Action(b'{"error": {"message": "no"}}', code, named)


def slow(seconds: float, then: Action) -> Action:
    then.wait_s = seconds
    return then


def drop() -> Action:
    action = Action()
    action.drops = True
    return action


def cut(then: Action) -> Action:
    """Promises the whole body, sends half of it, hangs up."""
    then.cut = True
    return then


def honest(asked: Asked) -> Action:
    """Right where the candidate is a reference, letter for letter (or a number word)."""
    words = {"four": "4", "200 centimetres": "2 m", "a bike": "bicycle", "The bus is red.": "red"}
    given = words.get(asked.candidate, asked.candidate)
    if given == "It's a dog, a small one.":
        given = "dog"
    return asked.verdict(given.lower() in [reference.lower() for reference in asked.references])


class Server:
    """`url` for clients; `asked` holds every request; `most_at_once` of them were open at a time."""

    def __init__(self, act: Act) -> None:
        self.act, self.asked = act, []
        self.authorizations: list[str | None] = []
        self.most_at_once = self._open = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._handle(self)

            def log_message(self, *arguments: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                """Clients that hang up are part of the play."""

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handle(self, http: BaseHTTPRequestHandler) -> None:
        body = json.loads(http.rfile.read(int(http.headers["content-length"])))
        with self._lock:
            asked = Asked(len(self.asked), body)
            self.asked.append(asked)
            self.authorizations.append(http.headers.get("authorization"))
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
        try:
            action = self.act(asked)
            time.sleep(action.wait_s)
            if action.drops:
                http.close_connection = True
                return
            http.send_response(action.status)
            http.send_header("content-type", "application/json")
            http.send_header("content-length", str(len(action.body)))
            for name, value in action.headers.items():
                http.send_header(name, value)
            http.end_headers()
            http.wfile.write(action.body[: len(action.body) // 2] if action.cut else action.body)
            http.close_connection = http.close_connection or action.cut
        except OSError:
            http.close_connection = True
        finally:
            with self._lock:
                self._open -= 1


@contextmanager
def serving(act: Act) -> Iterator[Server]:
    server = Server(act)
    try:
        yield server
    finally:
        server.close()
