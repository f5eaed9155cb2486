"""Sweeps: which runs there are, what happens when one fails or all are stopped, what is summed up."""

from __future__ import annotations

import asyncio
import json
import sys
import tomllib
from pathlib import Path

import pytest
from vtengine_training.cli import main
from vtengine_training.files import only_run_in
from vtengine_training.sweep import run as sweep_run
from vtengine_training.sweep.config import PlotConfig, SweepConfig
from vtengine_training.sweep.plan import grid, plan_runs, put, short
from vtengine_training.sweep.plot import ANY, lines, smoothed, spread

BASE = """
model = "glance-sft"
output = "elsewhere"
steps = 3
[data.glance]
[reward.penalty]
form = "paper"
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """sweep(text): the path of a sweep whose trainings are made up."""
    monkeypatch.setattr(sweep_run, "PROGRAM", (sys.executable, str(Path(__file__).with_name("fake_training.py"))))
    monkeypatch.setattr(sweep_run, "POLL_S", 0.05)
    (tmp_path / "base.toml").write_text(BASE)

    def make(text: str) -> Path:
        path = tmp_path / "my.toml"
        path.write_text(f'base = "base.toml"\noutput = "{tmp_path / "out"}"\n' + text)
        return path

    return make


def test_the_grid() -> None:
    found = grid({"reward": {"penalty": {"form": ["paper", "off"]}}, "seed": [1, 2]})
    assert found == [{"reward.penalty.form": form, "seed": seed} for form in ("paper", "off") for seed in (1, 2)]
    assert grid({}) == []
    with pytest.raises(ValueError, match=r"sweep.seed = 3: must be a list"):
        grid({"seed": 3})


def test_keys_in_names_are_as_short_as_they_can_be() -> None:
    assert short("reward.penalty.theta", ["reward.penalty.theta", "seed"]) == "theta"
    assert short("data.seed", ["data.seed", "seed"]) == "data.seed"
    assert short("seed", ["data.seed", "seed"]) == "seed"


def test_dotted_keys() -> None:
    data = {"loss": {"kl": "k3"}}
    put(data, "loss.algorithm", "dapo")
    put(data, "reward.penalty.form", "off")
    assert data == {"loss": {"kl": "k3", "algorithm": "dapo"}, "reward": {"penalty": {"form": "off"}}}
    with pytest.raises(ValueError, match="kl is not a section"):
        put(data, "loss.kl.x", 1)


def test_runs_have_whole_configs_of_their_own(tmp_path) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    config = SweepConfig(
        base="base.toml",
        output=str(tmp_path / "out"),
        set={"steps": 7},
        sweep={"reward.penalty.theta": [0.1, 0.2]},
        runs=({"name": "none", "reward": {"penalty": {"form": "off"}}},),
    )
    planned = plan_runs(config, tmp_path)
    assert [one.name for one in planned] == ["theta-0.1", "theta-0.2", "none"]
    made = tomllib.loads(planned[1].config)
    assert made["steps"] == 7 and made["reward"]["penalty"]["theta"] == 0.2
    assert made["output"] == str(tmp_path / "out" / "theta-0.2")
    assert made["data"]["folder"] == str(tmp_path / "out" / "data")  # written once for all
    assert tomllib.loads(planned[2].config)["reward"]["penalty"]["form"] == "off"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing is varied"),
        ("[sweep]\nsteps = 3", "must be a list"),
        ("[sweep]\nstep = [3]", "run step-3: step: unknown key"),
        ("[sweep]\nreward.penalty.form = ['papr']", "did you mean paper"),
        ("[[runs]]\nname = 'a'\n[[runs]]\nname = 'a'", "two runs are called a"),
        ("jobs = 0\n[sweep]\nseed = [1]", "jobs = 0"),
        ("[sweep]\nseed = [1]\n[plot]\nrows = 'sed'", "is not varied"),
    ],
)
def test_bad_sweeps_are_found_before_anything_runs(sweep, tmp_path, text, message, capsys) -> None:
    assert main(["sweep", str(sweep(text))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_error_of_a_run_says_where_it_stands(sweep, tmp_path, capsys) -> None:
    path = sweep("[sweep]\nseed = [1]")
    wrong = ("--set", "set.rollout.prompt=3")
    assert main(["sweep", str(path), "--set", "set.steps=2", *wrong, "--dry-run"]) == 2
    assert "--set set.rollout.prompt=3: run seed-1: rollout.prompt: unknown key" in capsys.readouterr().err
    path = sweep("[set]\nrollout.prompt = 3\n[sweep]\nseed = [1]")
    assert main(["sweep", str(path), "--set", "set.steps=2", "--dry-run"]) == 2
    assert f"{path}: run seed-1: rollout.prompt: unknown key" in capsys.readouterr().err
    (tmp_path / "base.toml").write_text("stepz = 3\n" + BASE)
    assert main(["sweep", str(sweep("[sweep]\nseed = [1]")), "--dry-run"]) == 2
    assert f"run seed-1: base {tmp_path / 'base.toml'}: stepz: unknown key" in capsys.readouterr().err
    assert main(["sweep", str(path), "--set", "base=gone.toml", "--dry-run"]) == 2
    assert f"--set base=gone.toml: base = 'gone.toml': {tmp_path / 'gone.toml'} is no file" in capsys.readouterr().err


def test_a_dry_run_names_what_is_missing_once(sweep, tmp_path, capsys) -> None:
    dry = ["sweep", str(sweep("[sweep]\nseed = [1, 2]")), "--dry-run"]
    assert main(dry) == 0 and "MISSING" not in capsys.readouterr().out
    assert main([*dry, "--set", "set.model=gone"]) == 2
    said = capsys.readouterr().out
    assert said.count("# MISSING: ") == 1 and "# MISSING: run seed-1: model: gone holds no config.json" in said
    assert not (tmp_path / "out").exists()


def test_one_fails_the_others_run_and_the_next_call_does_the_rest(sweep, tmp_path, capsys) -> None:
    path = sweep(f'jobs = 2\nlast = 2\nresults = "{tmp_path / "fig.json"}"\n[sweep]\nreward.penalty.theta = [0.1, 0.3]')
    out = tmp_path / "out"
    assert main(["sweep", str(path)]) == 3
    said = capsys.readouterr().err
    assert "run theta-0.3 ended with status 1: the reward is not a number" in said
    rows = {row["run"]: row for row in json.loads((out / "summary.json").read_text())["rows"]}
    assert rows["theta-0.1"]["state"] == "done" and rows["theta-0.3"]["state"] == "ended with status 1"
    assert rows["theta-0.1"]["steps"] == 3
    assert rows["theta-0.1"]["upscale/ratio"] == pytest.approx(0.25)  # of the last two of three steps
    assert rows["theta-0.1"]["curves"]["upscale/ratio"] == [[1, 0.1], [2, 0.2], [3, 0.3]]
    (out / "theta-0.3" / "mended").touch()
    assert main(["sweep", str(path)]) == 0
    assert (out / "theta-0.1" / "started.txt").read_text() == "once\n"
    assert (out / "theta-0.3" / "started.txt").read_text() == "once\nonce\n"
    written = json.loads((tmp_path / "fig.json").read_text())
    assert written["suite"] == "fig" and "fig-last" in written["tables"] and written["stamp"]["versions"]
    assert (out / "curves.png").stat().st_size > 1000


def test_a_run_that_another_sweep_left_behind_is_not_started_again(sweep, tmp_path, capsys) -> None:
    path = sweep("[sweep]\nreward.penalty.theta = [0.1, 0.2]")
    with only_run_in(tmp_path / "out" / "theta-0.1"):
        assert main(["sweep", str(path)]) == 3
    said = capsys.readouterr().err
    assert f"theta-0.1 ended with status 2: output = {tmp_path / 'out' / 'theta-0.1'}: another run is writing" in said
    assert not (tmp_path / "out" / "theta-0.1" / "log.txt").exists()
    assert main(["sweep", str(path)]) == 0


def test_a_metric_that_no_run_has_is_told_of(sweep, tmp_path, capsys) -> None:
    path = sweep(
        '[sweep]\nreward.penalty.theta = [0.1]\n[plot]\nmetrics = ["upscale/ration", "reward/accuracy", "loss"]'
    )
    assert main(["sweep", str(path)]) == 0
    said = capsys.readouterr().err
    assert "plot.metrics: no run has 'upscale/ration'; did you mean upscale/ratio? (corrected, the same" in said
    assert "no run has 'loss'; they have reward/accuracy, step, time/step, upscale/ratio, val/reward/accuracy (" in said
    assert "'reward/accuracy'" not in said
    path.write_text(path.read_text().replace("upscale/ration", "upscale/ratio").replace(', "loss"', ""))
    assert main(["sweep", str(path)]) == 0
    assert "plot.metrics" not in capsys.readouterr().err
    assert (tmp_path / "out" / "theta-0.1" / "started.txt").read_text() == "once\n"


def test_other_settings_are_refused(sweep, capsys) -> None:
    path = sweep("[sweep]\nreward.penalty.theta = [0.1]")
    assert main(["sweep", str(path)]) == 0
    assert main(["sweep", str(path), "--set", "set.steps=5"]) == 2
    assert "was begun with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "expected"), [("3, 5", {"3", "5"}), ("GPU-7f,-1,5", {"GPU-7f"}), ("", {""}), ("-1", {"-1"})]
)
def test_jobs_have_gpus_of_their_own(sweep, tmp_path, monkeypatch, visible, expected) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    path = sweep("[sweep]\nreward.penalty.theta = [0.1, 0.15, 0.2]")
    assert main(["sweep", str(path), "--set", "jobs=2"]) == 0
    assert {file.read_text() for file in (tmp_path / "out").rglob("gpu.txt")} == expected


def test_jobs_share_the_gpus_or_take_turns() -> None:
    assert sweep_run.shares(["3", "4", "5"], 1) == ["3,4,5"]  # such as an engine with tp_size = 2
    assert sweep_run.shares(["3", "4", "5"], 2) == ["3,5", "4"]
    assert sweep_run.shares(["3", "4"], 3) == ["3", "4", "3"]
    assert sweep_run.shares([], 2) == [None, None]


def test_stopping_asks_the_runs_to_save(sweep, tmp_path) -> None:
    path = sweep("[sweep]\nreward.penalty.theta = [0.5, 0.1]")
    config = SweepConfig("base.toml", str(tmp_path / "out"), sweep={"reward.penalty.theta": [0.5, 0.1]})
    planned = plan_runs(config, path.parent)
    sweep_run.prepare(planned)

    async def stopped() -> None:
        running = asyncio.create_task(sweep_run.run_all(planned, "grpo", 1, lambda: None, lambda _: None))
        while sweep_run.steps_done(planned[0]) < 3:
            await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(stopped())
    assert (planned[0].folder / "stopped.txt").read_text() == "saved"
    assert not planned[1].folder.exists() and not sweep_run.is_done(planned[0])


def test_lines_of_the_plot(tmp_path) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    config = SweepConfig(
        base="base.toml",
        output=str(tmp_path / "out"),
        sweep={"reward.penalty.form": ["paper", "released"], "reward.penalty.theta": [0.1], "seed": [0, 1]},
        runs=({"name": "off", "reward.penalty.form": "off"}, {"name": "bare", "seed": 3}),
    )
    planned = plan_runs(config, tmp_path)
    for one in planned:
        one.folder.mkdir(parents=True)
        (one.folder / "metrics.jsonl").write_text('{"step": 1, "upscale/ratio": 0.5}\nbroken\n')
    drawn = lines(planned, PlotConfig(rows="reward.penalty.form", average="seed"))
    assert [(line.label, line.row, len(line.runs)) for line in drawn[:2]] == [
        ("theta-0.1", "paper", 2),
        ("theta-0.1", "released", 2),
    ]
    assert drawn[-1].label == "bare" and drawn[-1].row is ANY
    alone = lines(planned, PlotConfig(average="seed"))
    found = [(line.label, len(line.runs)) for line in alone]
    assert found == [("form-paper_theta-0.1", 2), ("form-released_theta-0.1", 2), ("off", 1), ("bare", 1)]


def test_means_and_bands() -> None:
    assert smoothed([(1, 0.0), (2, 1.0), (3, 2.0)], 2) == [(1, 0.0), (2, 0.5), (3, 1.5)]
    mean, low, high = spread([[(1, 0.0), (2, 1.0)], [(2, 3.0), (3, 9.0)]])
    assert (mean, low, high) == ([(2, 2.0)], [1.0], [3.0])
