"""Interrupted runs: Ctrl-C, kill -9, a full disk; `--resume` gives the file of an uninterrupted run."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vtengine.engine.base import BackendFailed, Completion, OnTokens, Request
from vtengine.engine.scripted import ScriptedBackend

Run = Callable[..., Any]
SLOW = 0.25  # seconds per scripted reply


@pytest.fixture
def uninterrupted(vtengine: Run, scripted: Run, questions: Run, tmp_path: Path) -> Path:
    path = questions(40, b'{"id": "half')
    assert vtengine("generate", path, "-o", tmp_path / "whole.jsonl", *scripted(), "--concurrency", 4).status == 3
    return tmp_path / "whole.jsonl"


def arguments(tmp_path: Path, out: Path, flags: list[str], *more: str) -> list[Any]:
    return ["generate", tmp_path / "in.jsonl", "-o", out, *flags, "--concurrency", "4", *more]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_and_resumed(
    uninterrupted: Path, process: Run, vtengine: Run, scripted: Run, without_times: Run, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "out.jsonl"
    running = process(*arguments(tmp_path, out, scripted(SLOW)))
    running.wait_for_rows(out, 5)
    running.popen.send_signal(number)
    done = running.finish()
    there = out.read_bytes().count(b"\n")
    assert 5 <= there < 41
    if number == signal.SIGINT:
        assert done.status == 130
        assert done.err.strip().splitlines()[-1].count("--resume") == 1 and f"{there} of 41 rows" in done.err
    with out.open("ab") as file:
        file.write(b'{"id": "q30", "sam')  # torn, as a crash of the machine may leave it
    resumed = vtengine(*arguments(tmp_path, out, scripted(), "--resume"))
    assert resumed.status == 3
    assert without_times(out) == without_times(uninterrupted)
    assert out.read_bytes().startswith(b'{"id": "q0"') and not list(tmp_path.glob("out.jsonl.*"))


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_second_run_to_the_same_file_is_refused(
    process: Run, vtengine: Run, scripted: Run, questions: Run, rows_of: Run, tmp_path: Path, flags: list[str]
) -> None:
    questions(40)
    out = tmp_path / "out.jsonl"
    running = process(*arguments(tmp_path, out, scripted(0.1)))
    running.wait_for_rows(out, 2)
    running.popen.send_signal(signal.SIGSTOP)  # it shall not be done before the second has begun
    second = vtengine(*arguments(tmp_path, out, scripted(), *flags))
    running.popen.send_signal(signal.SIGCONT)
    assert second.status == 2 and second.err.count("\n") == 1 and "another run is writing it" in second.err
    assert running.finish().status == 0 and len(rows_of(out)) == 40 and not list(tmp_path.glob("out.jsonl.*"))


def test_resume_at_every_row(
    uninterrupted: Path, vtengine: Run, scripted: Run, without_times: Run, tmp_path: Path
) -> None:
    lines = uninterrupted.read_bytes().splitlines(keepends=True)
    for count in (0, 1, 7, 40, 41):
        out = tmp_path / f"from{count}.jsonl"
        out.write_bytes(b"".join(lines[:count]))
        vtengine(*arguments(tmp_path, out, scripted(), "--resume"))
        assert without_times(out) == without_times(uninterrupted)
        assert out.read_bytes().startswith(b"".join(lines[:count]))


def test_a_group_of_samples_is_taken_up_whole(
    vtengine: Run, scripted: Run, questions: Run, without_times: Run, tmp_path: Path
) -> None:
    questions(5)
    flags = scripted()
    vtengine(*arguments(tmp_path, tmp_path / "whole.jsonl", flags, "--n", "3", "--temperature", "1"))
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"".join(lines[:8]))
    vtengine(*arguments(tmp_path, out, flags, "--n", "3", "--temperature", "1", "--resume"))
    # Which sample of a question comes first to its image, and so finds it in no cache, is a matter of time.
    account = ("cached_tokens", "prefill_tokens", "encoded")
    assert without_times(out, *account) == without_times(tmp_path / "whole.jsonl", *account)
    assert out.read_bytes().splitlines(keepends=True)[:6] == lines[:6]


def test_resume_without_a_file_starts(
    vtengine: Run, scripted: Run, questions: Run, rows_of: Run, tmp_path: Path
) -> None:
    questions(3)
    assert vtengine(*arguments(tmp_path, tmp_path / "new.jsonl", scripted(), "--resume")).status == 0
    assert len(rows_of(tmp_path / "new.jsonl")) == 3


def test_more_rows_after_a_finished_run_are_made_with_the_settings_of_now(
    uninterrupted: Path, vtengine: Run, scripted: Run, questions: Run, tmp_path: Path
) -> None:
    questions(42, b'{"id": "half')
    rows = (tmp_path / "in.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "in.jsonl").write_bytes(b"".join(rows[:40] + rows[42:] + rows[40:42]))
    before = uninterrupted.read_bytes()
    done = vtengine(*arguments(tmp_path, uninterrupted, scripted(), "--resume", "--temperature", "1"))
    assert done.status == 3 and "its settings are not known" in done.err
    assert uninterrupted.read_bytes().startswith(before) and uninterrupted.read_bytes() != before
    done = vtengine(*arguments(tmp_path, uninterrupted, scripted(), "--resume"))
    assert done.status == 3 and "settings" not in done.err, "nothing is made any more"


def test_resume_refuses_rows_of_another_input(
    uninterrupted: Path, vtengine: Run, scripted: Run, questions: Run, tmp_path: Path
) -> None:
    before = uninterrupted.read_bytes()
    questions(3)
    done = vtengine(*arguments(tmp_path, uninterrupted, scripted(), "--resume"))
    assert done.status == 2 and "more rows" in done.err
    (tmp_path / "in.jsonl").write_bytes(b'{"id": "z", "image": "p0.png", "question": "q"}\n' * 2)
    done = vtengine(*arguments(tmp_path, uninterrupted, scripted(), "--resume"))
    assert done.status == 2 and "id 'q0', sample 0 where" in done.err
    assert uninterrupted.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value"), [("question", "Another?"), ("answer", "green"), ("k", -1), ("new", [1]), ("image", None)]
)
def test_resume_refuses_rows_of_a_changed_line(
    uninterrupted: Path, vtengine: Run, scripted: Run, tmp_path: Path, key: str, value: object
) -> None:
    lines = (tmp_path / "in.jsonl").read_text().splitlines()
    line = json.loads(lines[2]) | {key: value}
    lines[2] = json.dumps({name: found for name, found in line.items() if found is not None})
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    before = uninterrupted.read_bytes()
    done = vtengine(*arguments(tmp_path, uninterrupted, scripted(), "--resume"))
    assert done.status == 2 and "the input has changed" in done.err and "id 'q2'" in done.err
    assert uninterrupted.read_bytes() == before


def test_resume_refuses_other_settings(
    process: Run, vtengine: Run, scripted: Run, questions: Run, tmp_path: Path
) -> None:
    questions(40)
    out, flags = tmp_path / "out.jsonl", scripted(SLOW)
    running = process(*arguments(tmp_path, out, flags))
    running.wait_for_rows(out, 3)
    running.popen.kill()
    running.finish()
    done = vtengine(*arguments(tmp_path, out, flags, "--resume", "--seed", "5"))
    assert done.status == 2 and "seed was 0, is 5" in done.err


def test_an_older_output_is_kept(uninterrupted: Path, vtengine: Run, scripted: Run, tmp_path: Path) -> None:
    before = uninterrupted.read_bytes()
    done = vtengine(*arguments(tmp_path, uninterrupted, scripted()))
    assert (tmp_path / "whole.jsonl.previous").read_bytes() == before
    assert "the older file is now" in done.err and "whole.jsonl.previous" in done.err
    (tmp_path / "whole.jsonl.run").write_text("{}")
    assert "--resume goes on" in vtengine(*arguments(tmp_path, uninterrupted, scripted())).err


def test_an_unfinished_output_goes_on_under_its_new_name(
    uninterrupted: Path, process: Run, vtengine: Run, scripted: Run, without_times: Run, tmp_path: Path
) -> None:
    out, kept = tmp_path / "out.jsonl", tmp_path / "out.jsonl.previous"
    running = process(*arguments(tmp_path, out, scripted(SLOW)))
    running.wait_for_rows(out, 3)
    running.popen.kill()
    running.finish()
    begun = out.read_bytes()
    done = vtengine(*arguments(tmp_path, out, scripted(), "--seed", "5"))
    assert "of a run that was not finished" in done.err and kept.read_bytes() == begun
    refused = vtengine(*arguments(tmp_path, kept, scripted(), "--resume", "--seed", "5"))
    assert refused.status == 2 and "seed was 0, is 5" in refused.err
    assert vtengine(*arguments(tmp_path, kept, scripted(), "--resume")).status == 3
    assert without_times(kept) == without_times(uninterrupted)


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))


def test_full_disk_ends_with_one_line_and_can_be_resumed(
    uninterrupted: Path, process: Run, vtengine: Run, scripted: Run, without_times: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    done = process(*arguments(tmp_path, out, scripted()), preexec_fn=limit_file_size).finish()
    assert done.status == 1
    lines = [line for line in done.err.splitlines() if line]
    assert len(lines) == 1 and "writing failed" in lines[0] and "--resume" in lines[0]
    assert vtengine(*arguments(tmp_path, out, scripted(), "--resume")).status == 3
    assert without_times(out) == without_times(uninterrupted)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_to_a_full_device(process: Run, scripted: Run, questions: Run) -> None:
    path = questions(3)
    done = process("generate", path, "-o", "/dev/full", *scripted()).finish()
    assert done.status == 1 and "No space left on device" in done.err and done.err.count("\n") == 1


def test_output_to_a_pipe(process: Run, scripted: Run, questions: Run) -> None:
    path = questions(3)
    done = process("generate", path, "-o", "/dev/stdout", *scripted()).finish()
    assert done.status == 0 and len(done.out.splitlines()) == 3


def test_ctrl_c_while_started_in_the_background(process: Run, scripted: Run, questions: Run, tmp_path: Path) -> None:
    path = questions(40)
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), "stdin": subprocess.DEVNULL}
    running = process("generate", path, "-o", tmp_path / "out.jsonl", *scripted(SLOW), "--concurrency", 2, **ignore)
    running.wait_for_rows(tmp_path / "out.jsonl", 2)
    running.popen.send_signal(signal.SIGINT)
    running.popen.send_signal(signal.SIGINT)
    done = running.finish()
    assert done.status == 130 and "--resume" in done.err


@pytest.mark.parametrize("command", ["generate", "ask"])
def test_ctrl_c_while_the_model_is_loaded_ends_at_once(
    process: Run, scripted: Run, questions: Run, tmp_path: Path, command: str
) -> None:
    """A pipe in place of the replies: to load them waits for who writes."""
    path, flags, pipe = questions(3), scripted(), tmp_path / "replies.json"
    pipe.unlink()
    os.mkfifo(pipe)
    what = [path, "-o", tmp_path / "out.jsonl"] if command == "generate" else [tmp_path / "p0.png", "What?"]
    running = process(command, *what, *flags)
    with held_open(pipe):
        running.popen.send_signal(signal.SIGINT)
        done = running.finish()
    assert done.status == 130 and "interrupted" in done.err
    assert not list(tmp_path.glob("out.jsonl*"))


def test_ctrl_c_while_a_model_is_fetched_ends_at_once(
    vtengine: Run, questions: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fetch(_: str, **__: Any) -> str:
        signal.raise_signal(signal.SIGINT)
        fetched.append("all")
        return str(tmp_path)

    hub = SimpleNamespace(snapshot_download=fetch)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    done = vtengine("generate", questions(3), "-o", tmp_path / "out.jsonl", "--model", "owner/model")
    assert done.status == 130 and "interrupted" in done.err and not fetched


@contextmanager
def held_open(pipe: Path) -> Iterator[None]:
    """From when somebody reads it."""
    give_up_s = time.monotonic() + 100
    end = None
    while end is None:
        try:
            end = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody yet
            assert time.monotonic() < give_up_s
            time.sleep(0.05)
    try:
        yield
    finally:
        os.close(end)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`breaks(id)`: whether requests about a question fail; `asked`: ids of the questions that were asked about."""
    state = SimpleNamespace(breaks=lambda _: False, asked=set())
    generate = ScriptedBackend.generate

    async def maybe(self: ScriptedBackend, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        if request.images:
            name = request.request_id.partition("#")[0]
            state.asked.add(name)
            if state.breaks(name):
                raise BackendFailed("the server is down")
        return await generate(self, request, on_tokens)

    monkeypatch.setattr(ScriptedBackend, "generate", maybe)
    return state


def test_rows_that_failed_are_tried_again_and_no_other(
    uninterrupted: Path, server: SimpleNamespace, vtengine: Run, scripted: Run, without_times: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    server.breaks = {"q3", "q17", "q18"}.__contains__
    assert vtengine(*arguments(tmp_path, out, scripted())).status == 3
    assert [row["id"] for row in map(json.loads, out.open()) if row["status"] == "failed"] == ["q3", "q17", "q18"]
    server.breaks, server.asked = {"q18"}.__contains__, set()
    assert vtengine(*arguments(tmp_path, out, scripted(), "--resume")).status == 3
    assert server.asked == {"q3", "q17", "q18"}
    assert out.read_bytes().count(b'"failed"') == 1 and (tmp_path / "out.jsonl.run").exists()
    server.breaks = lambda _: False
    done = vtengine(*arguments(tmp_path, out, scripted(), "--resume"))
    assert done.status == 3  # the half line is rejected, and stays so
    account = ("cached_tokens", "prefill_tokens", "encoded")  # who is asked alone finds the cache empty
    assert without_times(out, *account) == without_times(uninterrupted, *account)
    assert not list(tmp_path.glob("out.jsonl.*"))


def test_an_interrupted_second_try_loses_nothing(
    uninterrupted: Path, server: SimpleNamespace, vtengine: Run, scripted: Run, without_times: Run, tmp_path: Path
) -> None:
    out, flags = tmp_path / "out.jsonl", scripted()
    server.breaks = {"q0", "q20", "q30"}.__contains__
    vtengine(*arguments(tmp_path, out, flags))
    server.breaks = {"q20"}.__contains__
    vtengine(*arguments(tmp_path, out, flags, "--resume"))
    # As a kill in the middle of a second try leaves it: rows behind q20 are put aside, the output ends before q25.
    lines = out.read_bytes().splitlines(keepends=True)
    put_aside = [b"[%d, %s]\n" % (place, lines[place].rstrip()) for place in range(21, 41)]
    (tmp_path / "out.jsonl.kept").write_bytes(b"".join(put_aside))
    out.write_bytes(b"".join(lines[:20]) + b"".join(lines[20:25]))
    server.breaks, server.asked = lambda _: False, set()
    vtengine(*arguments(tmp_path, out, flags, "--resume"))
    assert server.asked == {"q20"}
    account = ("cached_tokens", "prefill_tokens", "encoded")
    assert without_times(out, *account) == without_times(uninterrupted, *account)
    assert not list(tmp_path.glob("out.jsonl.*"))


def test_rows_put_aside_must_be_of_this_input(
    uninterrupted: Path, vtengine: Run, scripted: Run, tmp_path: Path
) -> None:
    row = uninterrupted.read_bytes().splitlines()[3]
    lines = uninterrupted.read_bytes().splitlines(keepends=True)
    uninterrupted.write_bytes(b"".join(lines[:2]))
    kept = tmp_path / "whole.jsonl.kept"
    for place, why in ((5, "has id 'q3'"), (99, "does not give")):
        kept.write_bytes(b"[%d, %s]\n" % (place, row))
        done = vtengine(*arguments(tmp_path, uninterrupted, scripted(), "--resume"))
        assert done.status == 2 and why in done.err and kept.exists()


def test_no_room_for_the_rows_put_aside(
    server: SimpleNamespace, process: Run, vtengine: Run, scripted: Run, questions: Run, tmp_path: Path
) -> None:
    questions(40)
    out, flags = tmp_path / "out.jsonl", scripted()
    server.breaks = {"q2"}.__contains__
    vtengine(*arguments(tmp_path, out, flags))
    before = out.read_bytes()
    done = process(*arguments(tmp_path, out, flags, "--resume"), preexec_fn=limit_file_size).finish()
    assert done.status == 1 and "out.jsonl.kept: writing failed" in done.err
    assert out.read_bytes() == before and not list(tmp_path.glob("out.jsonl.kept*"))
