"""The command line: signals, kills, exit statuses, bad usage."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from vtengine_training.cli import main
from vtengine_training.loggers.jsonl import cut_metrics, rounded
from vtengine_training.stopping import EXIT_STOPPED
from vtengine_training.trainer.checkpoint import find_latest
from vtengine_training.trainer.command import EXIT_DIVERGED, note

from vtengine.config import to_toml
from vtengine.protocol.profile import load_profile

REPO = Path(__file__).resolve().parents[3]
TIMED = ("time/", "samples/", "memory/")


@pytest.fixture
def command(make_config, tmp_path):
    """command(folder name, *overrides): the arguments of a run whose reward is a function of the tests."""
    config = make_config(steps=4, rollout={"concurrency": 1, "prompts": 2, "n": 4}, reward={"penalty": {"form": "off"}})
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config))

    def make(name: str, function: str, *overrides: str) -> list[str]:
        settings = [f"output={tmp_path / name}", "reward.accuracy=function", f"reward.function={function}", *overrides]
        return ["grpo", str(path), *(word for setting in settings for word in ("--set", setting))]

    return make


def start(arguments: list[str]) -> subprocess.Popen[str]:
    paths = (REPO, REPO / "kernels", REPO / "training", Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, "-m", "vtengine_training.cli", *arguments]
    return subprocess.Popen(whole, stderr=subprocess.PIPE, text=True, env=environment)


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_saves_and_has_its_own_status(command, tmp_path, number) -> None:
    process = start(command("stopped", "toy_reward:slow_low_bytes", "steps=500", "checkpoint.every=1000"))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/500"):
            process.send_signal(number)
            break
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == EXIT_STOPPED, rest
    folder = find_latest(tmp_path / "stopped" / "checkpoints")
    assert folder is not None
    step = int(folder.name[5:])
    assert 2 <= step <= 5
    assert f"stopped and saved at step {step} of 500" in rest
    assert [row["step"] for row in metrics(tmp_path / "stopped")] == list(range(1, step + 1))


@pytest.mark.slow
def test_killed_runs_end_as_uninterrupted_ones(command, tmp_path) -> None:
    whole = start(command("whole", "toy_reward:low_bytes", "steps=12"))
    assert whole.wait(timeout=300) == 0
    rng = random.Random(2)
    for step in (1, 3, 4, 6, 9, 11):
        process = start(command("parts", "toy_reward:low_bytes", "steps=12"))
        assert process.stderr is not None
        assert any(line.startswith(f"step {step}/12") for line in process.stderr)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
    assert start(command("parts", "toy_reward:low_bytes", "steps=12")).wait(timeout=300) == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    states = [find_latest(tmp_path / name / "checkpoints") for name in ("whole", "parts")]
    files = [next((folder / "optimizer").iterdir()).read_bytes() for folder in states if folder is not None]
    assert files[0] == files[1]


FULL_DISK = """
mount -t tmpfs -o size=$1 tmpfs "$2" || exit 99
cd "$2/.."; shift 2
"$@" 2> said; echo $? > full; ls parts/checkpoints > found; cat parts/checkpoints/latest > latest
mount -o remount,size=1g parts || exit 99
"$@" 2> /dev/null; echo $? > again; cp parts/metrics.jsonl metrics.jsonl
"""


@pytest.mark.slow
def test_a_full_disk_names_the_path_and_the_run_goes_on(command, tmp_path) -> None:
    """A file system with room for two checkpoints and a half, in a mount namespace of its own."""
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this machine gives no mount namespaces")
    whole = start(command("whole", "toy_reward:low_bytes"))
    assert whole.wait(timeout=300) == 0
    one = find_latest(tmp_path / "whole" / "checkpoints")
    assert one is not None
    room = int(2.5 * sum(-(-path.stat().st_size // 4096) * 4096 for path in one.rglob("*") if path.is_file()))
    (tmp_path / "parts").mkdir()
    paths = (REPO, REPO / "kernels", REPO / "training", Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "vtengine_training.cli", *command("parts", "toy_reward:low_bytes")]
    shell = ["unshare", "-rm", "sh", "-c", FULL_DISK, "sh", str(room), str(tmp_path / "parts"), *run]
    assert subprocess.run(shell, env=environment, check=False, timeout=300).returncode == 0
    said = (tmp_path / "said").read_text()
    assert (tmp_path / "full").read_text() == "1\n", said
    assert f"{tmp_path / 'parts' / 'checkpoints' / 'step-00000003'}: cannot be written" in said
    assert "No space left on device" in said and "Traceback" not in said
    assert (tmp_path / "found").read_text().split() == ["latest", "step-00000001", "step-00000002"]
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    assert (tmp_path / "again").read_text() == "0\n"
    (tmp_path / "parts" / "metrics.jsonl").write_text((tmp_path / "metrics.jsonl").read_text())
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_no_spread_ends_the_run_with_its_own_status(command, capsys) -> None:
    for name, settings, remedy in (
        ("dead", ("reward.accuracy=rules", "reward.function=''"), "raise rollout.n"),
        ("broken", (), "see the words of judge or reward function"),
    ):
        function = "tests.training.trainer.toy_reward:broken"
        assert main(command(name, function, *settings, "update.max_skipped=2")) == EXIT_DIVERGED
        said = capsys.readouterr().err
        assert "2 steps in a row had no group with spread" in said and remedy in said


@pytest.mark.parametrize("settings", [("steps=2",), ("steps=9", "update.max_skipped=2")], ids=["end", "before"])
def test_missing_images_end_the_run_and_export_nothing(command, tmp_path, capsys, monkeypatch, settings) -> None:
    """More of them than are drawn. With the images in their place, the same command trains."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    folder = tmp_path / "moved"
    folder.mkdir()
    rows = [{"id": f"m{k}", "image": f"images/{k}.png", "question": f"{k}?", "answer": "1"} for k in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = command("none", "toy_reward:low_bytes", f'data.files=["{folder / "rows.jsonl"}"]', *settings)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "data: all 16 (of 40) examples are in quarantine: none can be asked; the last one: " in said
    assert "images/" in said.splitlines()[-1]
    assert not (tmp_path / "none" / "model").exists() and find_latest(tmp_path / "none" / "checkpoints") is None
    (folder / "images").mkdir()
    for k in range(40):
        Image.new("RGB", (56, 56), (k, 3 * k, 100)).save(folder / "images" / f"{k}.png")
    assert main([*arguments, "--set", "steps=1"]) == 0
    assert (tmp_path / "none" / "model").is_dir()


def test_a_run_that_learned_nothing_exports_nothing(command, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    arguments = command("idle", "toy_reward:low_bytes", "reward.accuracy=rules", "reward.function=''", "steps=2")
    for _ in range(2):
        assert main(arguments) == EXIT_DIVERGED
        said = capsys.readouterr().err
        assert "stopped at step 2: none of 2 steps changed a weight" in said
        assert re.search(r"\(groups of the last one: .*zero_spread \d+.*\); raise rollout.n", said)
    assert not (tmp_path / "idle" / "model").exists()


def test_a_finished_run_has_nothing_to_do(command, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    arguments = command("once", "toy_reward:low_bytes", "steps=1")
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert "going on from step 1\n" in capsys.readouterr().err
    assert main([*arguments, "--set", "checkpoint.keep=5"]) == 0
    assert "going on from step 1; changed since: checkpoint.keep = 5 (was 2)\n" in capsys.readouterr().err
    assert (tmp_path / "once" / "model" / "model.safetensors").is_file()


def test_the_exported_model_brings_the_profile_that_it_was_trained_with(command, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    assert main(command("run", "toy_reward:low_bytes", "steps=1", "profile=visionthink")) == 0
    for model in ("model", "checkpoints/step-00000001/model"):
        assert load_profile(tmp_path / "run" / model) == load_profile("visionthink")


def test_dry_run_prints_config_and_plan_and_writes_nothing(command, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    assert main([*command("dry", "toy_reward:low_bytes"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for expected in (
        "[rollout]",
        "# Plan",
        "2 prompts x 4 samples",
        "# memory: about",
        "# together: about",
        "# compute:",
    ):
        assert expected in said
    assert main([*command("dry", "toy_reward:low_bytes", "loss.algorithm=sft"), "--dry-run"]) == 0
    assert "2 prompts, their replies written from their rows; 1 update\n" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.top_p=0.9", "renormalised"),
        ("rollout.top_k=20", "renormalised"),
        ("rollout.max_refill=inf", "max_refill = inf: must be finite"),
        ("rollout.oversample=inf", "oversample = inf: must be finite"),
        ("rollout.n=1", "siblings"),
        ("rollout.temperature=0.0", "greedy"),
        ("rollout.promts=3", "did you mean prompts"),
        ("update.minibatch_prompts=9", "at most rollout.prompts"),
        ("loss.algorithm=ppo", "must be one of"),
        ("loss.importance_cap=2.0", "recompute"),
        ("checkpoint.keep=0", "1 or more"),
        ("update.shard_ranks=8", "update.shard_ranks = 8: one process holds all the weights; start several with"),
        ("model=/no/such/folder", "no config.json"),
        ("model=glance-stf", "model: glance-stf holds no config.json; did you mean glance-sft?"),
        ("reward.function=''", "accuracy = 'function', function = '': name yours as package.module:name"),
        ("update.final_rate=1", "final_rate = 1.0: must be from 0 to learning_rate (="),
        ("update.warmup=99", "--set update.warmup=99: update.warmup = 99: must be at most steps (= "),
        ("data.files=[]", "JSONL"),
        ("data.files=['/no/such.jsonl']", "such.jsonl"),
        ("reward.function=toy_reward:missing", "has no missing"),
        ("reward.function=broken_reward:f", "SyntaxError in its own code"),
        ("data.seed=-1", "seed = -1: must be 0 or more"),
        ("rollout.max_context_tokens=8", "none can be asked; the last one: turn 1 needs"),
    ],
)
def test_bad_usage_names_field_and_remedy(command, tmp_path, override, message, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    (tmp_path / "broken_reward.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*command("bad", "toy_reward:low_bytes"), "--set", override]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_file_of_the_model_is_named(command, tmp_path, tiny_folder, monkeypatch, capsys, name) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    (folder / name).write_text("{")
    assert main(command("bad", "toy_reward:low_bytes", f"model={folder}")) == 2
    said = capsys.readouterr().err
    assert str(folder / name) in said and said.startswith("vtengine-train: ") and said.count("\n") == 1


def test_a_logger_without_its_package_is_said_before_anything_is_made(command, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(command("none", "toy_reward:low_bytes", 'loggers=["console", "wandb"]')) == 2
    assert "wandb is missing; pip install 'vtengine[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_logger_that_fails_ends_no_run(command, tmp_path, monkeypatch, caplog) -> None:
    module = pytest.importorskip("vtengine_training.loggers.tensorboard")
    pytest.importorskip("tensorboard")
    monkeypatch.syspath_prepend(Path(__file__).parent)

    def fail(self: object, row: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.TensorBoard, "log", fail)
    assert main(command("full", "toy_reward:low_bytes", "steps=2", 'loggers=["tensorboard"]')) == 0
    assert [row.get("loggers/failed") for row in metrics(tmp_path / "full")] == [None, 1]
    assert sum("goes on without it" in record.getMessage() for record in caplog.records) == 1


def test_metrics_after_a_kill(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 3)
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 0}\n{"step": 1}\n')
    cut_metrics(path, 1)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    cut_metrics(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["{}", "[1]", "3", '{"step": "x"}', "st"])
def test_metrics_that_are_not_ours_are_not_written_over(tmp_path, line) -> None:
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    path.write_text(text)
    with pytest.raises(OSError, match=r"metrics\.jsonl: line 2 is no row of metrics.*move the file away"):
        cut_metrics(path, 1)
    assert path.read_text() == text


def test_figures_as_json() -> None:
    assert rounded({"a": 1.0, "b": 1 / 3, "c": float("nan"), "d": float("inf")}) == {
        "a": 1,
        "b": 0.3333333,
        "c": None,
        "d": None,
    }


def test_a_full_gpu_is_no_traceback(command, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2 GiB.\nException raised from malloc at ..."
        )

    monkeypatch.setattr("vtengine_training.trainer.step.Learner.learn", full)
    assert main(command("full", "tests.training.trainer.toy_reward:low_bytes")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vtengine-train: stopped; run it again") and "allocate 2 GiB" in last
    assert "a lower update.max_tokens" in last


def test_what_the_console_says_of_a_step() -> None:
    assert note({"step": 0.0, "val/reward/accuracy": 0.5, "val/upscale/ratio": 1.0}) == (
        "val/reward/accuracy 0.5  val/upscale/ratio 1"
    )
    assert note({"step": 1.0, "groups/drawn": 12.0}) == "nothing scored: 12 groups drawn"


def test_a_model_of_the_hub_is_fetched_but_not_for_a_dry_run(
    command, tiny_folder, tmp_path, monkeypatch, capsys
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[str] = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tiny_folder))
    line = command("1", "tests.training.trainer.toy_reward:low_bytes", "model=owner/tiny")
    assert main([*line, "--dry-run"]) == 0 and not asked
    said = capsys.readouterr().out
    assert "no folder owner/tiny here; as an id of the Hugging Face hub: hf download owner/tiny\n" in said
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)
        assert main([*line, "--dry-run"]) == 2
        assert "# MISSING: model: no folder owner/tiny here; to fetch it" in capsys.readouterr().out
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: str(tiny_folder / file))
    assert main([*line, "--dry-run"]) == 0 and not asked
    assert "# model: " in capsys.readouterr().out
    assert main([*line, "--set", "steps=1"]) == 0
    assert asked == ["owner/tiny"] and (tmp_path / "1" / "model" / "config.json").is_file()

    def offline(name: str, **_: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    assert main(line) == 2
    assert "model = owner/tiny: no such folder, and fetching it failed: no network" in capsys.readouterr().err


def test_an_unknown_flag_is_one_line(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["grpo", "any.toml", "--dry-runn"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("vtengine-train grpo: ") and said.count("\n") == 1 and "did you mean --dry-run?" in said


def test_a_dry_run_names_what_is_missing(command, tmp_path, capsys) -> None:
    settings = ('data.files=["absent.jsonl"]', "profile=absent", "model=absent")
    assert main([*command("nothing", "no_such_module:name", *settings), "--dry-run"]) == 2
    said, why = capsys.readouterr()
    assert why.count("\n") == 1 and "would not start: data.files: absent.jsonl: no such file" in why
    assert "# MISSING: profile 'absent': not found" in said
    assert "# MISSING: model: absent holds no config.json" in said
    assert "# MISSING: data.files: absent.jsonl: no such file" in said
    assert "# MISSING: reward.function = 'no_such_module:name': cannot import" in said
    assert main([*command("nothing", "tests.training.rewards.rewards_of_users:half"), "--dry-run"]) == 0
    assert "MISSING" not in capsys.readouterr().out


@pytest.mark.skipif(find_spec("sglang") is not None, reason="SGLang is installed")
def test_a_dry_run_says_that_sglang_is_not_installed(command, capsys) -> None:
    line = command("nothing", "tests.training.rewards.rewards_of_users:half", "rollout.backend=sglang")
    assert main([*line, "--dry-run"]) == 2
    assert "# MISSING: backend sglang: SGLang is not installed here: pip install" in capsys.readouterr().out
