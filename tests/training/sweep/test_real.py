"""A sweep of real trainings, in small."""

from __future__ import annotations

import json

import pytest
from vtengine_training.cli import main

from tests.training.trainer.conftest import make_config, tiny_data, tiny_folder
from vtengine.config import to_toml

__all__ = ["make_config", "tiny_data", "tiny_folder"]


@pytest.mark.slow
def test_two_trainings(make_config, tmp_path) -> None:
    (tmp_path / "base.toml").write_text(to_toml(make_config(steps=2)))
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        f'base = "base.toml"\noutput = "{tmp_path / "out"}"\njobs = 2\n'
        '[sweep]\nloss.algorithm = ["grpo", "rloo"]\n[plot]\nmetrics = ["reward/mean"]\n'
    )
    # a random model earns nothing by rules: no spread is no failure of the sweep, but of both runs
    assert main(["sweep", str(sweep), "--set", "set.update.max_skipped=9"]) == 0
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert [(row["run"], row["state"], row["steps"]) for row in rows] == [
        ("algorithm-grpo", "done", 2),
        ("algorithm-rloo", "done", 2),
    ]
    assert (tmp_path / "out" / "algorithm-rloo" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "curves.png").is_file()
