"""Curation: labels, resuming, rows that can be trained on, bad rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vtengine_training.cli import main
from vtengine_training.curate.label import label
from vtengine_training.curate.summary import summary
from vtengine_training.data.config import DataConfig
from vtengine_training.data.load import load_examples

from vtengine.engine.base import RequestRejected
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.model import load_model
from vtengine.rollout.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (8, 8, "low_is_enough"),
        (7, 8, "neither"),
        (8, 7, "neither"),
        (2, 8, "needs_high"),
        (0, 6, "needs_high"),
        (0, 5, "neither"),
        (3, 8, "neither"),
        (0, 0, "neither"),
        (8, 0, "neither"),
    ],
)
def test_the_rule_of_the_paper(low, high, expected) -> None:
    assert label(low, high, rollouts=8, margin=6) == expected


@pytest.fixture
def curate(tiny_folder, tiny_data, tmp_path, monkeypatch):
    """curate(folder name, *overrides): runs the command; returns (status, rows)."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    config = tmp_path / "curate.toml"
    config.write_text(
        f'model = "{tiny_folder}"\nprofile = "glance"\nrollouts = 2\nmargin = 2\nmax_new_tokens = 4\nthreads = 1\n'
        f'concurrency = 4\ndevice = "cpu"\noutput = "to be set"\n'
        f'[data]\nfiles = ["{tiny_data}"]\n[reward]\naccuracy = "function"\nfunction = "toy_answers:by_id"\n'
    )

    def run(name: str, *overrides: str) -> tuple[int, list[dict]]:
        settings = [f"output={tmp_path / name}", *overrides]
        status = main(["curate", str(config), *(word for one in settings for word in ("--set", one))])
        path = tmp_path / name / "curated.jsonl"
        return status, [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    return run


LABELS = ["low_is_enough", "needs_high", "neither", "neither", "low_is_enough"]


def test_labels_counts_and_files(curate, tmp_path, capsys) -> None:
    status, rows = curate("a")
    assert status == 0
    assert "5/5  low_is_enough 2  needs_high 1\n" in capsys.readouterr().err
    assert [row["id"] for row in rows] == [f"q{k}" for k in range(5)]
    assert [row["label"] for row in rows] == LABELS
    assert (rows[1]["low_correct"], rows[1]["high_correct"], rows[1]["rollouts"]) == (0, 2, 2)
    assert all(row["low_tokens"] < row["high_tokens"] for row in rows)
    assert len({row["image"] for row in rows}) == 3
    assert all((tmp_path / "a" / row["image"]).is_file() for row in rows)
    found = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert found["labels"] == {"low_is_enough": 2, "needs_high": 1, "neither": 2}
    assert found["accuracy_low"] == 0.5 and found["accuracy_high"] == 0.7
    assert found["correct"][2][2] == 2 and found["correct"][0][2] == 1


def test_what_came_out_can_be_trained_on(curate, tmp_path) -> None:
    curate("a", "format=parquet")
    for name in ("curated.jsonl", "curated.parquet"):
        config = DataConfig(files=(str(tmp_path / "a" / name),), mix={"low_is_enough": 0.5, "needs_high": 0.5})
        found = load_examples(config, tmp_path / "unpacked")
        labels = [one.fields["label"] for one in found.examples]
        assert sorted(labels) == ["low_is_enough", "needs_high"]
        assert all((one.root / one.image).is_file() for one in found.examples)
        assert found.examples[labels.index("needs_high")].answers == ("1",)


def test_one_row_with_several_answers_fits_a_table_too(curate, tiny_data, tmp_path) -> None:
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()][:2]
    rows[1]["answer"] = ["1", "one"]
    path = tiny_data.with_name("several.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curate("a", "format=parquet", f"data.files=['{path}']")[0] == 0
    config = DataConfig(files=(str(tmp_path / "a" / "curated.parquet"),))
    found = load_examples(config, tmp_path / "unpacked").examples
    assert [one.answers for one in found] == [(rows[0]["answer"],), ("1", "one")]


def test_an_interrupted_curation_goes_on(curate, tmp_path, capsys) -> None:
    _, whole = curate("whole", "reward.function=toy_answers:by_id")
    curate("parts")
    path = tmp_path / "parts" / "curated.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    status, rows = curate("parts")
    assert status == 0 and "going on after 2 questions" in capsys.readouterr().err
    assert [row["id"] for row in rows] == [row["id"] for row in whole]
    assert [row["label"] for row in rows] == LABELS
    before = path.read_bytes()
    assert curate("parts")[0] == 0 and path.read_bytes() == before


def test_other_settings_are_refused(curate, capsys) -> None:
    curate("a")
    assert curate("a", "seed=5")[0] == 2
    assert "was begun with seed = 0, not 5" in capsys.readouterr().err
    assert curate("a", "concurrency=8")[0] == 0  # how fast is another matter


def test_bad_rows(curate, tiny_data, tmp_path, capsys) -> None:
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()][:3]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes((tiny_data.parent / f"{number}.png").read_bytes())
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    rows.append({"id": "no answer", "image": "0.png", "question": "?"})
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, found = curate("a", f"data.files=['{path}']", "reward.function=toy_answers:breaks_at_q2")
    assert status == 0
    assert [row["label"] for row in found] == ["low_is_enough", "rejected", "unscored"]
    assert "image" not in found[1] and found[1]["reason"].startswith("image_")
    assert "boom" in found[2]["reason"]
    assert f"no label for 1: {found[1]['reason']}" in capsys.readouterr().err
    told = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert told["left_out"] == {"answer_missing": 1}
    config = DataConfig(files=(str(tmp_path / "a" / "curated.jsonl"),))
    assert load_examples(config, tmp_path / "x").rejected == {"image_missing": 1}


def test_settings_that_the_engine_refuses_label_nothing(curate, monkeypatch, capsys) -> None:
    generate = EmbeddedEngine.generate

    async def refuse(self, request, on_tokens=None):
        if not request.images:  # the first one, which asks whether the engine works
            return await generate(self, request, on_tokens)
        raise RequestRejected("invalid_sampling", "here is why", "setup")

    monkeypatch.setattr(EmbeddedEngine, "generate", refuse)
    assert curate("a") == (2, [])
    assert "invalid_sampling: here is why" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("margin=3", "from 1 to rollouts"),
        ("rollouts=0", "1 or more"),
        ("temperature=0.0", "would be equal"),
        ("backend=vllm", "unknown"),
        ("model=/no/such/folder", "no such folder"),
        ("rolouts=3", "did you mean rollouts"),
        ("engine_args.tp_size=2", "engine_args: is for backend = \"sglang\", the backend is 'embedded'"),
        ("deadline_s=30.0", "deadline_s = 30: is for SGLang, the backend is embedded"),
        ("deadline_s=-1.0", "deadline_s = -1.0: must be 0 (no bound) or more"),
        ("reward.function=toy_answers:missing", "has no missing"),
    ],
)
def test_bad_usage_names_field_and_remedy(curate, override, message, capsys) -> None:
    assert curate("bad", override)[0] == 2
    assert message in capsys.readouterr().err


def test_an_engine_in_the_process_gets_its_arguments(curate, tiny_folder, monkeypatch, capsys) -> None:
    """An embedded engine stands in for SGLang's; those of memory may be others when a curation goes on."""
    made: list[dict] = []

    def build(folder, **options):
        made.append(options)
        return EmbeddedEngine(
            load_model(folder).requires_grad_(False), Tokenizer.load(folder), EngineConfig(kv_bytes=1 << 22)
        )

    monkeypatch.setattr("vtengine.engine.sglang.SglangEngineBackend", build)
    monkeypatch.setattr("vtengine.engine.sglang.inprocess.installed_version", lambda: "0.5.17")
    given = ("backend=sglang", "engine_args.quantization=fp8", "engine_args.mem-fraction-static=0.7", "deadline_s=30.0")
    assert curate("a", *given)[0] == 0
    assert made[0]["arguments"] == {"quantization": "fp8", "mem-fraction-static": 0.7}
    assert made[0]["deadline_s"] == 30
    assert curate("a", *given, "engine_args.mem-fraction-static=0.4", "deadline_s=5.0")[0] == 0
    assert curate("a", *given, "engine_args.quantization=awq")[0] == 2
    words = 'was begun with engine_args = {"quantization": "fp8"}, not {"quantization": "awq"}'
    assert words in capsys.readouterr().err


def test_agreement_with_the_labels_of_the_data() -> None:
    row = {"label": "needs_high", "rollouts": 8, "low_correct": 0, "high_correct": 8}
    rows = [row | {"needs_high": True}, row | {"needs_high": False}]
    assert summary(rows, {})["agrees_with_needs_high"] == 0.5
    assert "agrees_with_needs_high" not in summary([row], {})


def test_columns_that_are_called_like_ours(curate, tiny_data, tmp_path) -> None:
    """A data set with `reason`, `rollouts` and an empty `needs_high`: reasons are of rows without a label only."""
    rows = [json.loads(line) | {"reason": ["two"], "rollouts": "x"} for line in tiny_data.read_text().splitlines()][:2]
    rows[1]["needs_high"] = None
    path = tiny_data.with_name("like_ours.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"id": "q9", "image": "none.png"}]))
    status, found = curate("a", f"data.files=['{path}']")
    told = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert status == 0 and [row["label"] for row in found] == ["low_is_enough", "needs_high", "rejected"]
    assert found[0]["reason"] == ["two"] and found[1]["needs_high"] is True
    assert list(told["reasons"].values()) == [1] and told["accuracy_low"] == 0.5


def test_a_reward_that_always_fails_is_said_once(curate, caplog) -> None:
    status, rows = curate("a", "reward.function=toy_answers:always_breaks")
    assert status == 0 and {row["label"] for row in rows} == {"unscored"}
    assert caplog.text.count("boom") == 1


def test_a_dry_run_names_what_is_missing(curate, tmp_path, capsys) -> None:
    settings = ("model=absent", "profile=nothing", "data.files=['gone.jsonl']", "reward.function=nowhere:by_id")
    path = tmp_path / "curate.toml"
    dry = ["curate", str(path), "--dry-run"]
    assert main([*dry, *(word for one in settings for word in ("--set", one))]) == 2
    said = capsys.readouterr().out
    for what in (
        "model: absent holds no config.json",
        "profile 'nothing'",
        "data.files: gone.jsonl",
        "cannot import nowhere",
    ):
        assert f"MISSING: {what}" in said.replace("MISSING: reward.function = 'nowhere:by_id': ", "MISSING: ")
    assert main(dry) == 0 and "MISSING" not in capsys.readouterr().out
    assert main([*dry, "--set", "model=some/model"]) == 0  # an id of the hub is not looked up


def test_an_empty_output_is_refused(curate, tmp_path, capsys) -> None:
    assert main(["curate", str(tmp_path / "curate.toml"), "--set", "output="]) == 2
    assert "--set output=: output = '': must not be empty" in capsys.readouterr().err
