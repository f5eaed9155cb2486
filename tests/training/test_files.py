"""Files that are there whole or not at all; a place that cannot be written, or is taken, is found before the work."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from vtengine_training.cli import main
from vtengine_training.files import check_place, only_run_in, write_whole

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CONFIG = CONFIGS / "glance_eval.toml"


def test_a_good_place_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    check_place(path)
    assert not list(path.parent.iterdir())
    write_whole(path, "old")
    check_place(path)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("command", ["sft", "grpo", "eval", "curate", "sweep", "judge-check"])
def test_a_configuration_that_is_not_there_is_bad_usage(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, reason in ((tmp_path / "absent.toml", "No such file"), (tmp_path, "directory")):
        assert main([command, str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(path) in error and reason in error


@pytest.mark.parametrize("place", ["file/results.json", "folder"])
def test_an_evaluation_asks_nothing_if_its_results_cannot_be_written(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("vtengine_training.eval.runner.evaluate", lambda *_: pytest.fail("it began to ask"))
    assert main(["eval", str(CONFIG), "--set", f"results={tmp_path / place}"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / place).removesuffix("/results.json") in error


@pytest.mark.parametrize("name", ["sft", "grpo", "curate", "penalty_sweep"])
def test_two_runs_do_not_share_a_folder(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [name.removeprefix("penalty_"), str(CONFIGS / f"glance_{name}.toml"), "--set", f"output={tmp_path}"]
    with only_run_in(tmp_path):
        assert main(command) == 2
    assert f"output = {tmp_path}: another run is writing there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


HOLDS = """
import sys, time
from pathlib import Path
from vtengine_training.files import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("here", flush=True)
    time.sleep(600)
"""


def test_a_run_that_was_killed_keeps_no_folder(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "here\n"
        with pytest.raises(ValueError, match="another run is writing there"), only_run_in(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with only_run_in(tmp_path):
        pass
