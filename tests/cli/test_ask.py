"""`vtengine ask`: turns as they stream, then the account."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
CALL = '<think>small</think><tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'


def test_two_turns_and_the_account(vtengine: Run, scripted: Run, questions: Run, tmp_path: Path) -> None:
    questions(1)
    flags = scripted(0, [[CALL, "<think>now</think><answer>a red ball</answer>"]])
    done = vtengine("ask", tmp_path / "p0.png", "What is it?", *flags)
    assert done.status == 0 and not done.err
    first, second = done.out.index("turn 1: image 56x56 (4 tokens)"), done.out.index("turn 2: image 112x84 (12 tokens)")
    assert (
        first
        < done.out.index(CALL)
        < second
        < done.out.index("<think>now</think>")
        < done.out.index("answer: a red ball")
    )
    assert "visual tokens: 16 of 12 always-high (133%)" in done.out and "from the cache" in done.out


def test_text_comes_before_its_turn_ends(process: Run, scripted: Run, questions: Run, tmp_path: Path) -> None:
    questions(1)
    flags = scripted(0.5, [[CALL, "<think>now</think><answer>x</answer>"]])
    running = process("ask", tmp_path / "p0.png", "What is it?", *flags)
    assert running.popen.stdout.readline().startswith("turn 1")
    assert running.popen.poll() is None
    assert running.finish().status == 0


@pytest.mark.parametrize(
    ("image", "code"),
    [("absent.png", "image_not_found"), (".", "image_"), ("https://x.org/a.png", "image_url_not_allowed")],
)
def test_bad_image_is_one_line(vtengine: Run, scripted: Run, tmp_path: Path, image: str, code: str) -> None:
    done = vtengine("ask", tmp_path / image if "://" not in image else image, "What?", *scripted())
    assert done.status == 3 and code in done.err and done.err.count("\n") == 1


def test_an_image_outside_the_folder_is_fine_here(
    vtengine: Run, scripted: Run, questions: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions(1)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "link.png").symlink_to(tmp_path / "p0.png")
    monkeypatch.chdir(tmp_path / "deep")
    for image in ("../p0.png", "link.png"):
        assert vtengine("ask", image, "What?", *scripted()).status == 0


def test_model_text_cannot_steer_the_terminal(vtengine: Run, scripted: Run, questions: Run, tmp_path: Path) -> None:
    questions(1)
    flags = scripted(0, [["<think>\x1b[2J\x1b]0;owned\x07\r</think><answer>\x1b[31mred\x9b</answer>"]])
    done = vtengine("ask", tmp_path / "p0.png", "What?", *flags)
    assert not any(ord(letter) < 32 and letter != "\n" for letter in done.out) and "\x9b" not in done.out


def test_a_reader_that_leaves_is_no_fault(process: Run, scripted: Run, questions: Run, tmp_path: Path) -> None:
    questions(1)
    running = process("ask", tmp_path / "p0.png", "What?", *scripted(0.3, [["<think>a</think><answer>b</answer>"]]))
    running.popen.stdout.readline()
    running.popen.stdout.close()
    assert running.popen.stderr.read() == ""
    assert running.popen.wait(60) in (0, 1)


def test_no_answer_is_said(vtengine: Run, scripted: Run, questions: Run, tmp_path: Path) -> None:
    questions(1)
    done = vtengine("ask", tmp_path / "p0.png", "What?", *scripted(0, [["just text"]]))
    assert done.status == 0 and "answer: none (malformed:" in done.out


def test_without_an_image(vtengine: Run, scripted: Run) -> None:
    done = vtengine("ask", "none", "2 + 2?", *scripted(text="<think>sum</think><answer>4</answer>"))
    assert done.status == 0 and done.out.startswith("turn 1: ") and "answer: 4\n" in done.out
    assert "image" not in done.out and "visual" not in done.out


def test_a_file_that_is_called_none(
    vtengine: Run, scripted: Run, questions: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions(1)
    (tmp_path / "p0.png").rename(tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    assert "turn 1: image 56x56" in vtengine("ask", "./none", "What?", *scripted()).out
