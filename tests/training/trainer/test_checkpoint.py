"""Checkpoints are whole or not there: kills at any moment, damaged files, full disks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vtengine_training.trainer import checkpoint
from vtengine_training.trainer.checkpoint import (
    CheckpointError,
    Sealed,
    check,
    find_latest,
    seal,
    step_name,
    write_checkpoint,
)

REPO = Path(__file__).resolve().parents[3]


def writer(text="x", size=1):
    def write(folder: Path) -> Sealed:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(text.encode() * size)
        (folder / "state.json").write_text("{}")
        return seal(folder, ["state.json"])

    return write


def test_written_listed_and_found(tmp_path) -> None:
    path = write_checkpoint(tmp_path, 3, writer("abc"), keep=2)
    assert path == find_latest(tmp_path) == tmp_path / "step-00000003"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert manifest["files"]["model/weights"]["bytes"] == 3
    assert sorted(manifest["files"]) == ["model/weights", "state.json"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_keeps_the_newest(tmp_path) -> None:
    for keep, expected in ((2, [4, 5]), (1, [5])):
        for step in range(6):
            write_checkpoint(tmp_path / str(keep), step, writer(), keep)
        names = sorted(p.name for p in (tmp_path / str(keep)).glob("step-*"))
        assert names == [step_name(step) for step in expected]


def test_a_step_written_again_is_replaced(tmp_path) -> None:
    write_checkpoint(tmp_path, 1, writer("old"), 2)
    path = write_checkpoint(tmp_path, 1, writer("new"), 2)
    assert (path / "model" / "weights").read_text() == "new"


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "no manifest", "no json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, caplog) -> None:
    good = write_checkpoint(tmp_path, 1, writer("abc"), 2)
    bad = write_checkpoint(tmp_path, 2, writer("abc"), 2)
    target = bad / "model" / "weights"
    {
        "cut": lambda: target.write_bytes(b"ab"),
        "flip": lambda: target.write_bytes(b"abd"),
        "missing": target.unlink,
        "no manifest": (bad / "manifest.json").unlink,
        "no json": lambda: (bad / "manifest.json").write_text("{"),
    }[damage]()
    assert check(bad) is not None
    assert find_latest(tmp_path) == good
    assert "passed over" in caplog.text
    (good / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        find_latest(tmp_path)


def test_latest_may_be_missing_or_name_nothing(tmp_path) -> None:
    assert find_latest(tmp_path / "absent") is None
    assert find_latest(tmp_path) is None
    path = write_checkpoint(tmp_path, 7, writer(), 2)
    for text in ("step-99999999", "", "../../etc"):
        (tmp_path / "latest").write_text(text)
        assert find_latest(tmp_path) == path
    (tmp_path / "latest").unlink()
    assert find_latest(tmp_path) == path


def test_a_full_disk_leaves_the_older_one(tmp_path) -> None:
    path = write_checkpoint(tmp_path, 1, writer(), 2)

    def full(folder: Path) -> Sealed:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, 2, full, 2)
    assert find_latest(tmp_path) == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_what_a_dead_process_left_is_removed(tmp_path) -> None:
    for name in (".writing-1", ".stale-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".latest-1").write_text("x")
    write_checkpoint(tmp_path, 1, writer(), 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_interrupted_between_any_two_system_calls(tmp_path, monkeypatch) -> None:
    """The process dies before its k-th rename or flush, for every k: what is found is the old state or the new one."""
    for k in range(40):
        root = tmp_path / str(k)
        write_checkpoint(root, 1, writer("one"), 1)
        calls = [0]

        class Killed(BaseException):
            pass

        def guarded(function, calls=calls, k=k, killed=Killed):
            def wrapper(*arguments, **names):
                if calls[0] == k:
                    raise killed
                calls[0] += 1
                return function(*arguments, **names)

            return wrapper

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.Path, "replace", guarded(Path.replace))
            patch.setattr(checkpoint.os, "fsync", guarded(os.fsync))
            patch.setattr(checkpoint.shutil, "rmtree", guarded(checkpoint.shutil.rmtree))
            try:
                write_checkpoint(root, 2, writer("two"), 1)
                finished = True
            except Killed:
                finished = False
        found = find_latest(root)
        assert found is not None and check(found) is None
        assert (found / "model" / "weights").read_text() in ("one", "two")
        write_checkpoint(root, 3, writer("three"), 1)
        assert find_latest(root) == root / step_name(3)
        if finished:
            return
    raise AssertionError("the write never came to its end")


LOOP = """
import sys
from pathlib import Path
from vtengine_training.trainer.checkpoint import find_latest, write_checkpoint
root = Path(sys.argv[1])
step = int(find_latest(root).name[5:]) if find_latest(root) else 0
print("ready", flush=True)
while True:
    step += 1
    def write(folder):
        for name in range(4):
            (folder / str(name)).write_bytes(b"%d" % step * 20000)
        return {}
    write_checkpoint(root, step, write, 2)
    print(step, flush=True)
"""


def test_kill_9_at_random_moments(tmp_path) -> None:
    """Twenty processes that do nothing but save, each killed at a random moment."""
    rng = random.Random(1)
    environment = os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'kernels'}:{REPO / 'training'}"}
    last = 0
    for _ in range(20):
        command = [sys.executable, "-c", LOOP, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        reported = int(rest[-1]) if rest else last
        found = find_latest(tmp_path)
        if found is None:
            assert reported == 0
            continue
        step = int(found.name[5:])
        assert step >= reported
        assert (found / "3").read_bytes() == b"%d" % step * 20000
        last = step
    assert last > 0
