"""Strict reading of IN.jsonl: each bad line is a rejection with its code, and reading goes on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtengine.cli import inputs
from vtengine.cli.inputs import InputRow, RejectedRow, count_inputs, first_rejection, read_inputs

GOOD = b'{"id": "a", "image": "a.png", "question": "What?"}\n'


def read(folder: Path, *lines: bytes) -> list[InputRow | RejectedRow]:
    path = folder / "in.jsonl"
    path.write_bytes(b"".join(lines))
    return list(read_inputs(path))


def test_good_row_keeps_its_values(tmp_path: Path) -> None:
    line = {"id": 7, "image": "a.png", "question": "Wie viele Äpfel?", "answer": ["3", 3.5], "kind": {"x": [1, None]}}
    (row,) = read(tmp_path, json.dumps(line, ensure_ascii=False).encode())
    carried = {"image": "a.png", "question": "Wie viele Äpfel?", "kind": {"x": [1, None]}}
    assert row == InputRow(1, 7, "a.png", "Wie viele Äpfel?", ("3", "3.5"), carried)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"id": "x", "image": "a.png", "question": "W\xffhat?"}', "line_not_utf8"),
        (b'{"id": "x", "image": "a.png", "quest', "line_not_json"),
        (b"what?", "line_not_json"),
        (b'{"image": "a.png", "question": "q", "x": NaN}', "line_not_json"),
        (b'{"image": "a.png", "question": "q", "x": 1e999}', "line_not_json"),
        (b'{"image": "a.png", "question": "q", "image": "b.png"}', "line_not_json"),
        (b'{"image": "a.png", "question": "q"} {"image": "b.png"}', "line_not_json"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line_not_json"),
        (b'{"x": ' + b"9" * 10_000 + b"}", "line_not_json"),
        (b'["a.png", "What?"]', "line_not_object"),
        (b'"a.png"', "line_not_object"),
        (b"null", "line_not_object"),
        (b'{"id": ["x"], "image": "a.png", "question": "q"}', "id_wrong_type"),
        (b'{"id": true, "image": "a.png", "question": "q"}', "id_wrong_type"),
        (b'{"id": 1.5, "image": "a.png", "question": "q"}', "id_wrong_type"),
        (b'{"id": "", "image": "a.png", "question": "q"}', "id_wrong_type"),
        (b'{"image": "", "question": "q"}', "image_missing"),
        (b'{"image": " ", "question": "q"}', "image_missing"),
        (b'{"images": ["a.png"], "question": "q"}', "image_missing"),
        (b'{"image": null, "Image": "a.png", "question": "q"}', "image_missing"),
        (b'{"imgae": "a.png", "question": "q"}', "image_missing"),
        (b'{"picture": {"path": "a.png"}, "question": "q"}', "image_missing"),
        (b'{"img_path": "a.png", "question": "q"}', "image_missing"),
        (b'{"image_name": "a.png", "question": "q"}', "image_missing"),
        (b'{"image": 5, "question": "q"}', "image_wrong_type"),
        (b'{"image": ["a.png"], "question": "q"}', "image_wrong_type"),
        (b'{"image": "a.png"}', "question_missing"),
        (b'{"image": "a.png", "question": "  "}', "question_missing"),
        (b'{"image": "a.png", "question": {"text": "q"}}', "question_wrong_type"),
        (b'{"image": "a.png", "question": "q", "answer": {"a": 1}}', "answer_wrong_type"),
        (b'{"image": "a.png", "question": "q", "answer": [true]}', "answer_wrong_type"),
        (b'{"image": "a.png", "question": "q", "status": "answered"}', "key_reserved"),
        (b'{"image": "a.png", "question": "\\ud800"}', "text_not_unicode"),
        (b'{"id": "\\udc00", "image": "a.png", "question": "q"}', "text_not_unicode"),
    ],
)
def test_bad_line_is_rejected_and_the_next_is_read(tmp_path: Path, line: bytes, code: str) -> None:
    bad, good = read(tmp_path, line + b"\n", GOOD)
    assert isinstance(bad, RejectedRow) and bad.code == code and bad.line == 1 and bad.message
    assert "\n" not in bad.message and len(bad.message) < 300
    assert isinstance(good, InputRow) and good.id == "a"
    json.dumps([bad.id, bad.carried], allow_nan=False).encode("ascii")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (b'{"image": "a.png", "quesiton": "q"}', "; the row has 'quesiton'"),
        (b'{"images": ["a.png"], "question": "q"}', "; the row has 'images'"),
        (b'{"image": "", "question": "q"}', "is missing or empty"),
    ],
)
def test_a_key_that_is_missing_may_be_a_typo(tmp_path: Path, line: bytes, hint: str) -> None:
    (bad,) = read(tmp_path, line)
    assert isinstance(bad, RejectedRow) and bad.message.endswith(hint)


def test_half_a_line_at_the_end_is_rejected(tmp_path: Path) -> None:
    good, bad = read(tmp_path, GOOD, GOOD[:30])
    assert isinstance(good, InputRow) and isinstance(bad, RejectedRow)
    assert bad.code == "line_not_json"


def test_last_line_needs_no_newline(tmp_path: Path) -> None:
    assert all(isinstance(row, InputRow) for row in read(tmp_path, GOOD.rstrip()))


def test_first_row_with_an_id_keeps_it(tmp_path: Path) -> None:
    rows = read(
        tmp_path, GOOD, GOOD, b'{"id": 1, "image": "i", "question": "q"}\n{"id": "1", "image": "i", "question": "q"}'
    )
    codes = [row.code if isinstance(row, RejectedRow) else None for row in rows]
    assert codes == [None, "id_duplicate", None, "id_duplicate"]
    assert rows[1].id == "a"


def test_rows_without_an_id_are_named_after_their_line(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        b"\xef\xbb\xbf",
        b'{"image": "i", "question": "q"}\r\n',
        b" \n",
        b"{]\n",
        b'{"image": "j", "question": "q"}',
    )
    assert [(row.id, row.line) for row in rows] == [("line-1", 1), ("line-3", 3), ("line-4", 4)]


def test_a_line_that_is_too_long_is_skipped_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_LINE_BYTES", 64)
    rows = read(tmp_path, b'{"x": "' + b"y" * 300 + b'"}\n', GOOD, b'{"x": "' + b"y" * 300)
    assert [row.code if isinstance(row, RejectedRow) else "ok" for row in rows] == [
        "line_too_long",
        "ok",
        "line_too_long",
    ]


def test_what_could_be_read_is_carried(tmp_path: Path) -> None:
    (row,) = read(tmp_path, b'{"id": "k", "image": 5, "question": "q", "source": "web", "turns": []}')
    assert isinstance(row, RejectedRow) and row.id == "k"
    assert row.carried == {"image": 5, "question": "q", "source": "web"}


@settings(max_examples=300)
@given(st.binary(max_size=200).filter(lambda data: not data.startswith(inputs.GZIP_MAGIC)))
def test_any_bytes_give_rows_that_can_be_written(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    rows = read(folder, data)
    for row in rows:
        json.dumps([row.id, row.carried], allow_nan=False).encode("ascii")
    assert count_inputs(folder / "in.jsonl") == len(rows)


def test_a_packed_file_is_read_as_what_is_in_it(tmp_path: Path) -> None:
    lines = GOOD + b"\n{]\n" + GOOD.replace(b'"a"', b'"b"')
    packed = read(tmp_path, gzip.compress(lines[:40]), gzip.compress(lines[40:]))
    assert packed == read(tmp_path, lines) and [row.id for row in packed] == ["a", "line-3", "b"]


def test_a_packed_file_that_is_cut_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gzip data is damaged"):
        read(tmp_path, gzip.compress(GOOD * 1000)[:-20])


@pytest.mark.parametrize(
    ("lines", "line"), [(GOOD, None), (b"{]\n" + GOOD, None), (b'{"a": 1}\n', None), (b"", None), (b"\nid,a\n7\n", 2)]
)
def test_a_file_without_any_object_is_told_by_its_first_line(tmp_path: Path, lines: bytes, line: int | None) -> None:
    (tmp_path / "in.jsonl").write_bytes(lines)
    found = first_rejection(tmp_path / "in.jsonl")
    assert (found and found.line) == line


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(["id", "image", "question", "answer", "other", "status"])


@settings(max_examples=150)
@given(st.dictionaries(keys, json_values))
def test_any_object_is_accepted_or_rejected_with_a_code(tmp_path_factory: pytest.TempPathFactory, record: dict) -> None:
    (row,) = read(tmp_path_factory.getbasetemp(), json.dumps(record).encode())
    if isinstance(row, InputRow):
        assert (row.image is None or isinstance(row.image, str)) and row.question.strip()
    else:
        assert row.code


@pytest.mark.parametrize(
    "more", [b"", b', "image": null', b', "image": []', b', "images": []', b', "image_id": 7, "page": "3"']
)
def test_a_question_about_text_alone(tmp_path: Path, more: bytes) -> None:
    (row,) = read(tmp_path, b'{"question": "q"' + more + b"}\n")
    assert isinstance(row, InputRow) and row.image is None and row.question == "q"
