"""The output file: whole rows, cut and continued after a crash, clear errors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vtengine.cli.errors import CliError, UsageError
from vtengine.cli.output import OutputFile, check_free, check_settings, complete_rows, settings_path

SETTINGS = {"model": "m", "seed": 0}


def written(path: Path, *rows: dict) -> Path:
    output = OutputFile(path, SETTINGS)
    for row in rows:
        output.append(row)
    output.close(finished=True)
    return path


def test_rows_are_lines_of_ascii_json(tmp_path: Path) -> None:
    path = written(tmp_path / "o.jsonl", {"id": "ü\n", "x": [1, None]}, {"id": 2})
    assert path.read_bytes() == b'{"id": "\\u00fc\\n", "x": [1, null]}\n{"id": 2}\n'
    assert not settings_path(path).exists()


@pytest.mark.parametrize("tail", [b"", b'{"id": 3', b'{"id": 3}', b"\x00\x00", b'{"id"\n', b"[1]\n"])
def test_a_torn_tail_is_cut_and_writing_goes_on(tmp_path: Path, tail: bytes) -> None:
    path = written(tmp_path / "o.jsonl", {"id": 1}, {"id": 2})
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    ends = [end for _, end in complete_rows(path)]
    assert ends[-1] == len(whole)
    output = OutputFile(path, SETTINGS, resume_at=ends[-1])
    output.append({"id": 3})
    output.close(finished=True)
    assert path.read_bytes() == whole + b'{"id": 3}\n'


@pytest.mark.parametrize("text", ["first\nsecond\n", "one\n", "one"])
def test_a_foreign_file_is_not_cut(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"notes\.txt: .* file"):
        list(complete_rows(path))


def test_an_older_file_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "o.jsonl", {"id": 1})
    written(path, {"id": 2})
    assert path.read_bytes() == b'{"id": 2}\n'
    assert (tmp_path / "o.jsonl.previous").read_bytes() == b'{"id": 1}\n'


def test_no_older_file_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    for number in range(1, 5):
        written(path, {"id": number})
    names = ("o.jsonl.previous", "o.jsonl.previous.2", "o.jsonl.previous.3", "o.jsonl")
    assert {name: (tmp_path / name).read_text() for name in names} == {
        name: f'{{"id": {number}}}\n' for number, name in enumerate(names, 1)
    }
    (tmp_path / "o.jsonl.previous").unlink()
    (tmp_path / "o.jsonl.previous.kept").write_text("rows put aside\n")
    written(path, {"id": 5})
    assert (tmp_path / "o.jsonl.previous.4").exists()
    assert (tmp_path / "o.jsonl.previous.kept").read_text() == "rows put aside\n"


def test_a_reader_that_has_gone_is_no_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    output = OutputFile(path, SETTINGS)
    os.close(reader)
    with pytest.raises(CliError, match="reader has gone"):
        output.append({"id": 1})
    output.close(finished=False)


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    check_free(path)
    first = OutputFile(path, SETTINGS)
    first.append({"id": 1})
    with pytest.raises(UsageError, match=r"o\.jsonl: another run is writing it"):
        check_free(path)
    with pytest.raises(UsageError, match="another run is writing it"):
        OutputFile(path, SETTINGS, resume_at=0)
    assert path.read_bytes() == b'{"id": 1}\n'
    first.close(finished=True)
    check_free(path)
    OutputFile(path, SETTINGS, resume_at=10).close(finished=True)


def test_settings_of_an_unfinished_run_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    output = OutputFile(path, SETTINGS)
    output.close(finished=False)
    check_settings(path, SETTINGS)
    with pytest.raises(UsageError, match=r"seed was 0, is 1\); give them back, or leave out --resume"):
        check_settings(path, SETTINGS | {"seed": 1})


@pytest.mark.parametrize("marker", ["", "{", "[]", "5", "null"])
def test_settings_that_cannot_be_read_are_passed_over(tmp_path: Path, marker: str) -> None:
    settings_path(tmp_path / "o.jsonl").write_text(marker)
    check_settings(tmp_path / "o.jsonl", SETTINGS)


@pytest.mark.parametrize("name", ["missing/o.jsonl", ".", "file.txt/o.jsonl"])
def test_unwritable_path_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(UsageError, match=r"-o \S+: cannot be written: [A-Z][a-z ]+$"):  # the file's name once
        OutputFile(tmp_path / name, SETTINGS)


def test_full_disk_is_one_line_with_advice() -> None:
    output = OutputFile(Path("/dev/full"), SETTINGS)
    with pytest.raises(CliError, match=r"No space left on device.*--resume") as caught:
        output.append({"id": 1})
    assert caught.value.status == 1
