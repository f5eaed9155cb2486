"""`vtengine serve` as a process: start, usage errors, a graceful stop, and the shipped model behind it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.running import ANSWER, CALL, ask, byte_tokenizer, data_url
from vtengine.cli import main
from vtengine.cli.arguments import build_parser
from vtengine.server.config import ServerLimits

REPO = Path(__file__).resolve().parents[2]
SHIPPED = REPO / "vtengine" / "assets" / "glance"
IMAGES = REPO / "examples" / "glance" / "images"


class Process:
    """`vtengine serve` on a free port."""

    def __init__(self, *arguments: str) -> None:
        folders = [str(REPO), str(REPO / "kernels"), str(REPO / "training")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "vtengine.cli", "serve", "--port", "0", *arguments]
        self.popen = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for(r" on (http://\S+)")

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.log += line

    def wait_for(self, pattern: str) -> str:
        """A group of the pattern, once the log has it."""
        give_up_s = time.monotonic() + 150
        while not (found := re.search(pattern, self.log)):
            assert self.popen.poll() is None and time.monotonic() < give_up_s, self.log
            time.sleep(0.02)
        return found[1]

    def wait_until_running(self) -> None:
        """Returns once an episode is at work."""
        give_up_s = time.monotonic() + 60
        while "vtengine_requests_running 1.0" not in get(self.url + "/metrics")[1]:
            assert time.monotonic() < give_up_s
            time.sleep(0.02)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=2, timeout=60)

    def finish(self) -> int:
        status = self.popen.wait(timeout=60)
        self._reader.join()
        assert "Traceback" not in self.log and "leaked" not in self.log, self.log
        return status


@pytest.fixture
def process() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*arguments: str) -> Process:
        started.append(Process(*arguments))
        return started[-1]

    yield start
    for one in started:
        if one.popen.poll() is None:
            one.popen.kill()
            one.popen.wait()


@pytest.fixture
def scripted(tmp_path: Path) -> Callable[..., list[str]]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    byte_tokenizer()._encoder.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    (folder / "profile.toml").write_bytes((REPO / "vtengine/protocol/profiles/glance.toml").read_bytes())

    def flags(delay_s: float = 0.0) -> list[str]:
        replies = tmp_path / "replies.json"
        replies.write_text(json.dumps({"delay_s": delay_s, "scripts": [[CALL, ANSWER]]}))
        return ["--model", str(folder), "--backend", f"scripted:{replies}"]

    return flags


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_serves_and_stops(process: Callable[..., Process], scripted: Callable[..., list[str]]) -> None:
    server = process(*scripted(), "--served-name", "mine")
    reply = server.client().chat.completions.create(model="mine", messages=ask())  # type: ignore[arg-type]
    assert reply.choices[0].message.content == "a red ball"
    assert get(server.url + "/ready") == (200, '{"status":"ready"}')
    assert 'vtengine_episodes_total{status="answered"} 1.0' in get(server.url + "/metrics")[1]
    assert "# TYPE vtengine_engine_requests_total counter" in get(server.url + "/metrics")[1]
    server.popen.send_signal(signal.SIGINT)
    assert server.finish() == 0
    assert "POST /v1/chat/completions 200" in server.log and "no API key" not in server.log


def test_a_model_in_the_current_folder_has_the_name_of_that(
    process: Callable[..., Process], scripted: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "tiny")
    server = process(*scripted(), "--model", ".")
    assert server.client().models.list().data[0].id == "tiny"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_running_requests_finish(
    process: Callable[..., Process], scripted: Callable[..., list[str]], number: int
) -> None:
    server = process(*scripted(delay_s=2.0))
    replies: list[Any] = []
    client = server.client()

    def run() -> None:
        replies.append(client.chat.completions.create(model="tiny", messages=ask()))  # type: ignore[arg-type]

    thread = threading.Thread(target=run)
    thread.start()
    server.wait_until_running()
    server.popen.send_signal(number)
    thread.join(timeout=30)
    assert server.finish() == 0
    assert replies[0].choices[0].message.content == "a red ball"
    assert "stopping: 1 requests are inside" in server.log


def test_a_hangup_is_ignored_where_it_was_at_the_start(
    process: Callable[..., Process], scripted: Callable[..., list[str]]
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        server = process(*scripted())
    finally:
        signal.signal(signal.SIGHUP, before)
    server.popen.send_signal(signal.SIGHUP)
    assert get(server.url + "/ready") == (200, '{"status":"ready"}')
    server.popen.send_signal(signal.SIGTERM)
    assert server.finish() == 0 and server.log.count("stopping: ") == 1


def test_what_outlasts_the_drain_is_told(process: Callable[..., Process], scripted: Callable[..., list[str]]) -> None:
    server = process(*scripted(delay_s=5.0), "--set", "drain_s=1")
    caught: list[Exception] = []

    def run() -> None:
        try:
            server.client().with_options(max_retries=0).chat.completions.create(model="tiny", messages=ask())  # type: ignore[arg-type]
        except openai.APIStatusError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    server.wait_until_running()
    server.popen.send_signal(signal.SIGTERM)
    thread.join(timeout=30)
    assert server.finish() == 0
    assert caught[0].status_code == 503 and caught[0].code == "shutting_down"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--set", "max_wating=3"], "--set max_wating=3: max_wating: unknown key; did you mean max_waiting?"),
        (["--set", "max_running=0"], "--set max_running=0: max_running = 0: must be >= 1"),
        (["--set", "max_image_pixels=999999999"], "--set max_image_pixels=999999999: max_image_pixels = "),
        (["--set", "max_body_bytes=9999999999"], "max_body_bytes=9999999999: max_held_bytes = 1073741824: must be"),
        (["--config", "absent.toml"], "absent.toml"),
        (["--api-key-file", "absent.keys"], "absent.keys"),
        (["--api-key-env", "VTENGINE_NOT_SET"], "VTENGINE_NOT_SET"),
        (["--port", "70000"], "65535"),
        (["--host", "256.1.1.1"], "cannot listen"),
        (["--backend", "other"], "--backend other"),
    ],
)
def test_usage_errors_are_one_line(flags: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *flags]) in (1, 2)
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1 and "Traceback" not in error


def test_port_in_use(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 1
    assert "cannot listen there: " in capfd.readouterr().err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert "pip install 'vtengine[serve]'" in capfd.readouterr().err


@pytest.mark.skipif(not (SHIPPED / "model.safetensors").is_file(), reason="the shipped model is not in this tree")
def test_the_shipped_model(process: Callable[..., Process]) -> None:
    """Real weights on the embedded engine: turn 2 resumes from the cache, seeds repeat, streams equal wholes and keep
    the pace."""
    server = process("--max-new-tokens", "48", "--set", "max_text_events_per_s=1")
    images = sorted(IMAGES.glob("*.png")) if IMAGES.is_dir() else []
    urls = [data_url(path.read_bytes()) for path in images[:3]] or [data_url()]
    client = server.client()
    for url in urls:
        options: dict[str, Any] = {"model": "glance", "messages": ask("What colour is the shape?", url)}
        options["logprobs"] = True
        whole = client.chat.completions.create(**options)
        turns = whole.vtengine["turns"]  # type: ignore[attr-defined]
        for before, turn in itertools.pairwise(turns):
            reusable = before["prompt_tokens"] + before["completion_tokens"]
            assert turn["cached_tokens"] >= reusable - 17, "all but at most one page"
        chunks = list(client.chat.completions.create(**options, stream=True))
        content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert content == whole.choices[0].message.content != ""
        tokens = whole.choices[0].logprobs.content  # type: ignore[union-attr]
        assert content in "".join(token.token for token in tokens or ()) and chunks[-2].choices[0].logprobs is not None
        assert all(math.exp(token.logprob) > 0.01 for token in tokens or ()), "greedy"
        texts = [chunk for chunk in chunks if chunk.choices[0].delta.model_dump(exclude_none=True).keys() - {"role"}]
        assert len(texts) <= sum(turn["completion_tokens"] for turn in turns) / 2
        sampled = [client.chat.completions.create(**options, temperature=1, seed=5) for _ in range(2)]
        assert sampled[0].choices[0].message == sampled[1].choices[0].message
    assert "vtengine_engines 1.0" in get(server.url + "/metrics")[1], "one engine, in a process of its own"
    server.popen.send_signal(signal.SIGTERM)
    assert server.finish() == 0


@pytest.mark.skipif(not (SHIPPED / "model.safetensors").is_file(), reason="the shipped model is not in this tree")
def test_the_account_is_the_one_that_the_page_shows(process: Callable[..., Process]) -> None:
    image = REPO / "examples/glance/images/test-0-00117.png"
    page = (REPO / "docs" / "serving.md").read_text()
    shown = re.search(r"^`vtengine`, in a whole reply.*\n.*\n\n((?:    .*\n)+)", page, re.MULTILINE)
    messages = ask("Price of SYR?", data_url(image.read_bytes()))
    reply = process("--device", "cpu").client().chat.completions.create(model="glance", messages=messages)
    assert shown is not None
    assert without_times(reply.vtengine) == without_times(json.loads(shown[1]))  # type: ignore[attr-defined]


def without_times(account: Any) -> Any:
    if isinstance(account, dict):
        return {name: without_times(value) for name, value in account.items() if not name.endswith("_s")}
    return [without_times(value) for value in account] if isinstance(account, list) else account


def test_every_limit_is_documented() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(ServerLimits)}
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d.]+) ?(MiB|GiB)? \|", (REPO / "docs" / "serving.md").read_text(), re.MULTILINE
    )
    units = {"": 1, "MiB": 1 << 20, "GiB": 1 << 30}
    assert {name: float(value) * units[unit] for name, value, unit in rows} == fields
    help_text = " ".join(build_parser()._subparsers._group_actions[0].choices["serve"].epilog.split())  # type: ignore
    assert all(name in help_text for name in fields)


def test_a_second_signal_does_not_wait(process: Callable[..., Process], scripted: Callable[..., list[str]]) -> None:
    server = process(*scripted(delay_s=10.0), "--set", "drain_s=60")
    client = server.client().with_options(max_retries=0)
    caught: list[Exception] = []

    def run() -> None:
        try:
            client.chat.completions.create(model="tiny", messages=ask())  # type: ignore[arg-type]
        except openai.APIConnectionError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    server.wait_until_running()
    server.popen.send_signal(signal.SIGTERM)
    server.wait_for("(stopping)")
    server.popen.send_signal(signal.SIGTERM)
    assert server.finish() == 0
    thread.join()
    assert caught, "it was not cut off"
