"""Examples and their order: strict reading, shuffling that can stop and go on."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vtengine_training.data.examples import read_dataset
from vtengine_training.data.sampler import Sampler


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(**changes):
    return {"image": "a.png", "question": "what?", "answer": "x"} | changes


def test_rows_become_examples(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", [row(id="one", needs_high=True), row(answer=["1", 2])])
    data = read_dataset([path])
    assert [one.id for one in data.examples] == ["one", "line-2"]
    assert data.examples[0].fields == {"needs_high": True}
    assert data.examples[1].answers == ("1", "2")
    assert data.examples[0].root == tmp_path and not data.rejected


def test_bad_rows_are_counted_by_reason(tmp_path) -> None:
    bad = [row(image=None), row(question=""), {"image": "a", "question": "b"}, "no json", row(id="x"), row(id="x")]
    data = read_dataset([write(tmp_path / "a.jsonl", bad)])
    assert len(data) == 1
    codes = ("image_missing", "question_missing", "answer_missing", "line_not_json", "id_duplicate")
    assert data.rejected == dict.fromkeys(codes, 1)


def test_an_answer_of_white_space_is_none(tmp_path) -> None:
    rows = [row(answer=""), row(answer=[" ", "\n"]), row(id="x", answer=["", "4"])]
    data = read_dataset([write(tmp_path / "a.jsonl", rows)])
    assert [one.answers for one in data.examples] == [("4",)]
    assert data.rejected == {"answer_missing": 2}


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path) -> None:
    with pytest.raises(ValueError, match="answer_missing 1"):
        read_dataset([write(tmp_path / "a.jsonl", [{"image": "a", "question": "b"}])])


def test_several_files(tmp_path) -> None:
    files = [write(tmp_path / name, [row(), row(id="same")]) for name in ("a.jsonl", "b.jsonl")]
    data = read_dataset(files)
    assert [one.id for one in data.examples] == ["a:line-1", "same", "b:line-1"]
    assert data.rejected == {"id_duplicate": 1}


def test_fingerprint_follows_content_and_order_not_place(tmp_path) -> None:
    (tmp_path / "other").mkdir()
    rows = [row(id="a"), row(id="b")]
    first = read_dataset([write(tmp_path / "a.jsonl", rows)])
    assert read_dataset([write(tmp_path / "other" / "b.jsonl", rows)]).fingerprint == first.fingerprint
    assert read_dataset([write(tmp_path / "b.jsonl", rows[::-1])]).fingerprint != first.fingerprint
    assert (
        read_dataset([write(tmp_path / "c.jsonl", [row(id="a", answer="y"), rows[1]])]).fingerprint != first.fingerprint
    )


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 9), st.integers(0, 3), st.integers(0, 40), st.integers(0, 40))
def test_stopping_changes_nothing(size, seed, before, after) -> None:
    whole = Sampler(size, seed)
    drawn = [whole.draw() for _ in range(before + after)]
    first = Sampler(size, seed)
    parts = [first.draw() for _ in range(before)]
    second = Sampler.restore(size, seed, json.loads(json.dumps(first.state())))
    assert parts + [second.draw() for _ in range(after)] == drawn
    for epoch in range(len(drawn) // size):
        assert sorted(one for _, one in drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_differ_and_draws_count_up() -> None:
    sampler = Sampler(20, 1)
    drawn = [sampler.draw() for _ in range(40)]
    assert [number for number, _ in drawn] == list(range(40))
    assert [one for _, one in drawn[:20]] != [one for _, one in drawn[20:]]
    assert sampler.epoch == 2


def test_quarantine() -> None:
    sampler = Sampler(3, 0)
    sampler.quarantine(1)
    restored = Sampler.restore(3, 0, json.loads(json.dumps(sampler.state())))
    for one in (sampler, restored):
        assert {one.draw()[1] for _ in range(10)} == {0, 2}
    restored.quarantine(0)
    restored.quarantine(2)
    with pytest.raises(ValueError, match="quarantine"):
        restored.draw()
    with pytest.raises(ValueError, match="0 examples"):
        Sampler(0, 0)
