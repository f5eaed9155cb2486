"""Loggers: what they write is read back, a missing package is said at the start, a failing one ends no run."""

from __future__ import annotations

import json
import logging
import struct
import sys
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vtengine_training.loggers import wandb as wandb_logger
from vtengine_training.loggers.base import Guarded, numbers
from vtengine_training.loggers.config import LoggerName, WandbConfig
from vtengine_training.loggers.open import check_loggers, open_loggers


@dataclass(frozen=True)
class Config:
    output: str
    loggers: tuple[LoggerName, ...] = ()
    wandb: WandbConfig = field(default_factory=WandbConfig)


def row(step: int, value: float) -> dict[str, Any]:
    return {"step": float(step), "reward/mean": value, "kl": float("nan"), "phase": "talk", "val": {"high": value / 2}}


def write(config: Config, done: int, rows: list[dict[str, Any]]) -> None:
    with open_loggers(config, 9, done, lambda row: f"reward {row['reward/mean']}") as report:
        for one in rows:
            report(one)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_metrics_jsonl_is_always_written_and_cut_when_a_run_goes_on(tmp_path) -> None:
    write(Config(str(tmp_path)), 0, [row(step, 0.5) for step in (1, 2, 3)])
    write(Config(str(tmp_path)), 2, [row(3, 0.25)])
    assert [one["step"] for one in lines(tmp_path)] == [1, 2, 3]
    assert lines(tmp_path)[-1] == {"step": 3, "reward/mean": 0.25, "kl": None, "phase": "talk", "val": {"high": 0.125}}


def test_the_console_says_a_line_per_row(tmp_path, capsys) -> None:
    write(Config(str(tmp_path), ("console",)), 0, [row(1, 0.5)])
    assert capsys.readouterr().err == "step 1/9  reward 0.5\n"
    write(Config(str(tmp_path), ("jsonl",)), 1, [row(2, 0.5)])
    assert capsys.readouterr().err == ""


def test_numbers_of_a_row() -> None:
    assert numbers(row(1, 0.5) | {"done": True}) == {"step": 1, "reward/mean": 0.5, "val/high": 0.25}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_names_the_extra(monkeypatch, name) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"{name} is missing; pip install 'vtengine\[{name}\]'"):
        check_loggers(("jsonl", name))
    check_loggers(("console", "jsonl"))


def test_a_folder_called_wandb_is_no_package(monkeypatch, tmp_path) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="wandb is missing"):
        check_loggers(("wandb",))


def events(output: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, as TensorBoard shows them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(output / "tensorboard"))
    found.Reload()
    return {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    config = Config(str(tmp_path), ("tensorboard",))
    write(config, 0, [row(step, 0.5) for step in (1, 2, 3, 4)])
    assert events(tmp_path)["reward/mean"] == [(step, 0.5) for step in (1, 2, 3, 4)]
    write(config, 2, [row(step, 0.25) for step in (3, 4, 5)])
    expected = [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25), (5, 0.25)]
    assert events(tmp_path) == {"reward/mean": expected, "val/high": [(step, value / 2) for step, value in expected]}


def test_a_full_disk_under_tensorboard_is_said_once_and_counted(tmp_path, monkeypatch, caplog) -> None:
    module = pytest.importorskip("tensorboard.summary.writer.record_writer")
    config = Config(str(tmp_path), ("tensorboard",))

    def full(self: object, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the writing thread's own
    with caplog.at_level(logging.WARNING), open_loggers(config, 9, 0, str) as report:
        report(row(1, 0.5))
        monkeypatch.setattr(module.RecordWriter, "write", full)
        for step in (2, 3, 4):
            report(row(step, 0.5))
    assert [one.get("loggers/failed", 0) for one in lines(tmp_path)] == [0, 0, 1, 2]
    said = [record.getMessage() for record in caplog.records if "tensorboard" in record.getMessage()]
    assert len(said) == 2 and "No space left" in said[0] and "failed 4 times" in said[1]


class Broken:
    def log(self, row: object) -> None:
        raise ConnectionError("down")

    def close(self) -> None:
        raise ConnectionError("still down")


def test_failures_of_log_and_close_stay_inside(caplog) -> None:
    guarded = Guarded("wandb", Broken())
    with caplog.at_level(logging.WARNING):
        guarded.log({"step": 1})
        guarded.log({"step": 2})
        guarded.close()
    assert guarded.num_failed == 3
    assert caplog.records[0].getMessage() == (
        "logger wandb failed, and the run goes on without it: ConnectionError('down')"
    )
    assert len(caplog.records) == 2


class FakeRun:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments, self.logged, self.metrics = arguments, [], {}
        self.can_finish = threading.Event()
        self.can_finish.set()

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics[name] = step_metric

    def log(self, data: dict[str, float]) -> None:
        self.logged.append(data)

    def finish(self) -> None:
        self.can_finish.wait()


@pytest.fixture
def fake_wandb(monkeypatch):
    """The runs that a module with wandb's init opens."""
    runs: list[FakeRun] = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **arguments: runs.append(FakeRun(arguments)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return runs


def test_wandb_gets_numbers_and_a_resumed_run_is_the_same_one(tmp_path, fake_wandb) -> None:
    config = Config(str(tmp_path), ("wandb",), WandbConfig("mine", "us", "first", "online"))
    write(config, 0, [row(1, 0.5)])
    write(config, 1, [row(2, 0.25)])
    first, second = fake_wandb
    assert first.logged == [{"step": 1, "reward/mean": 0.5, "val/high": 0.25}]
    assert first.metrics == {"step": None, "*": "step"}
    names = ("project", "entity", "name", "mode", "resume", "dir")
    assert [first.arguments[key] for key in names] == ["mine", "us", "first", "online", "allow", str(tmp_path)]
    assert first.arguments["config"]["loggers"] == ["wandb"]
    assert first.arguments["id"] == second.arguments["id"] == (tmp_path / "wandb-id").read_text().strip() != ""


def test_wandb_that_cannot_open_a_run_is_an_error_at_the_start(tmp_path, fake_wandb, monkeypatch) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(ValueError, match=r"api_key not configured.*wandb login.*offline"):
        write(Config(str(tmp_path), ("wandb",)), 0, [])


def test_the_end_does_not_wait_for_ever(tmp_path, fake_wandb, monkeypatch, caplog) -> None:
    monkeypatch.setattr(wandb_logger, "CLOSING_SECONDS", 0.05)
    with caplog.at_level(logging.WARNING), open_loggers(Config(str(tmp_path), ("wandb",)), 9, 0, str):
        fake_wandb[0].can_finish.clear()
    assert "wandb sync" in caplog.text
    fake_wandb[0].can_finish.set()


def records(path: Path) -> Iterator[bytes]:
    """Of a .wandb file: 7 bytes, then LevelDB's log: blocks of 32 KiB, pieces of (checksum, length, kind, bytes)."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_rows(folder: Path) -> tuple[set[str], list[tuple[int, float, float]]]:
    """Ids of the runs in a folder, and (step, reward/mean, val/high) of each row, session after session."""
    from wandb.proto.wandb_internal_pb2 import Record

    seen, ids = [], set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for record in map(Record.FromString, records(path)):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                seen.append((items["step"], items["reward/mean"], items["val/high"]))
    return ids, seen


def test_wandb_itself_offline(tmp_path, monkeypatch) -> None:
    """Two sessions of one run, read back from its files."""
    pytest.importorskip("wandb")
    monkeypatch.setattr(wandb_logger, "CLOSING_SECONDS", 300)
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    output = tmp_path / "run"
    output.mkdir()
    config = Config(str(output), ("wandb",), WandbConfig(project="tests", mode="offline"))
    write(config, 0, [row(1, 0.5), row(2, 0.5)])
    write(config, 1, [row(2, 0.25)])
    deadline = time.monotonic() + 30
    while len(wandb_rows(output)[1]) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)  # on a busy machine its service ends later than its client
    ids, seen = wandb_rows(output)
    assert ids == {(output / "wandb-id").read_text().strip()}
    assert seen == [(1, 0.5, 0.25), (2, 0.5, 0.25), (2, 0.25, 0.125)]
