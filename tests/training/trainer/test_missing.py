"""What a run lacks is found without loading anything."""

from __future__ import annotations

import sys

import pytest
from vtengine_training.trainer.command import missing


@pytest.mark.parametrize(
    ("package", "settings", "words"),
    [
        ("peft", {"lora": {"rank": 8}}, "lora.rank = 8: needs peft, which is missing; pip install 'vtengine[lora]'"),
        ("openai", {"reward": {"accuracy": "judge", "judge": {"model": "m"}}}, "pip install 'vtengine[judge]'"),
        ("httpx", {"rollout": {"backend": "http://127.0.0.1:1"}}, "pip install 'vtengine[sglang]'"),
        ("wandb", {"loggers": ["wandb"]}, "pip install 'vtengine[wandb]'"),
        ("pyarrow", {"data": {"files": ["rows.parquet"]}}, "data.files: needs pyarrow, which is missing; pip install"),
        ("datasets", {"data": {"files": ["saved"]}}, "data.files: needs datasets, which is missing; pip install"),
    ],
)
def test_packages_that_the_configuration_wants(make_config, monkeypatch, tmp_path, package, settings, words) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.parquet").touch()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").touch()
    config = make_config(**settings)
    assert not list(missing(config))
    monkeypatch.setitem(sys.modules, package, None)
    (what,) = missing(config)
    assert words in what
