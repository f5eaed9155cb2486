"""An evaluation of a model of any family, with its own image processor and profile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vtengine_training.cli import main

from tests.tiny_model import QWEN3_VISION, TINY_VISION, byte_encoder, config_of, qwen3_text, tiny_text
from vtengine.model import ModelConfig, save_model
from vtengine.model.families import MODELS

ENCODER = byte_encoder()
CONFIGS = [config_of(tiny_text(272), TINY_VISION, ENCODER), config_of(qwen3_text(272), QWEN3_VISION, ENCODER)]


def save(config: ModelConfig, folder: Path, **processor: object) -> Path:
    folder.mkdir()
    ENCODER.save(str(folder / "tokenizer.json"))
    save_model(MODELS[config.model_type].build(config, 3), folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def evaluated(folder: Path, results: Path) -> tuple[int, dict]:
    config = results.with_suffix(".toml")
    config.write_text(f'model = "{folder}"\ncount = 3\nmax_new_tokens = 3\nresults = "{results}"\n')
    status = main(["eval", str(config)])
    return status, json.loads(results.read_text())["results"] if results.is_file() else {}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_every_family_can_be_evaluated(tmp_path, config) -> None:
    """The pictures of 280 x 224 pixels are shown at most at 64 patches of a side of 14 or 16: 16 visual tokens."""
    side = config.vision.patch_size
    folder = save(config, tmp_path / "model", patch_size=side, min_pixels=4 * side * side, max_pixels=64 * side * side)
    status, found = evaluated(folder, tmp_path / "found.json")
    assert status == 0 and set(found) == {"low", "high", "adaptive"}
    assert 0 < found["low"]["visual_tokens"] < found["high"]["visual_tokens"] <= 3 * 16


def test_a_profile_in_the_folder_is_the_one_that_is_used(tmp_path, capsys) -> None:
    folder = save(CONFIGS[1], tmp_path / "model", patch_size=16)
    (folder / "profile.toml").write_text("name = 1")
    assert evaluated(folder, tmp_path / "found.json") == (2, {})
    assert str(folder / "profile.toml") in capsys.readouterr().err


def test_older_results_are_kept(tmp_path, capsys) -> None:
    folder, results = save(CONFIGS[0], tmp_path / "model"), tmp_path / "found.json"
    results.write_text("first")
    for kept in ("found.json.previous", "found.json.previous.2"):
        before = results.read_text()
        assert evaluated(folder, results)[0] == 0
        assert (tmp_path / kept).read_text() == before
        assert f"{results}: the older file is now {tmp_path / kept}" in capsys.readouterr().err
    assert (tmp_path / "found.json.previous").read_text() == "first"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_dry_run_names_a_missing_model(tmp_path, capsys) -> None:
    path = tmp_path / "eval.toml"
    path.write_text("count = 3\n")
    assert main(["eval", str(path), "--dry-run"]) == 0
    assert main(["eval", str(path), "--dry-run", "--set", "model=absent"]) == 2
    assert "# MISSING: model: absent holds no config.json" in capsys.readouterr().out
