"""Every configuration and every profile that is shipped loads."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PROFILES = sorted((REPO / "vtengine" / "protocol" / "profiles").glob("*.toml"))
CONFIGS = sorted((REPO / "configs").rglob("*.toml"))
SHOWN = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in sorted((REPO / "docs").glob("*.md"))
    for number, block in enumerate(re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE))
]


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profile(path: Path) -> None:
    from vtengine.protocol.profile import load_profile

    assert load_profile(path.stem) == load_profile(path)


def test_the_named_profiles_exist() -> None:
    assert {"vtengine", "visionthink", "glance"} <= {path.stem for path in PROFILES}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`NAME_COMMAND.toml` is a configuration of `vtengine-train COMMAND`."""
    from vtengine_training.cli import main

    command = path.stem.rpartition("_")[2]
    status = main([command, str(path), "--dry-run"])
    said = capsys.readouterr().out
    assert said and status == (2 if "# MISSING: " in said else 0)  # weights and data that are not shipped


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_unknown_key_of_a_config_is_an_error(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vtengine_training.cli import main

    assert main([path.stem.rpartition("_")[2], str(path), "--set", "no_such_key=1", "--dry-run"]) == 2
    assert "no_such_key" in capsys.readouterr().err


@pytest.mark.parametrize("block", SHOWN)
def test_config_on_a_page(block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of one gets what every run must have; a sweep stands beside the file that it varies."""
    from vtengine_training.cli import main

    command = "sweep" if "base = " in block else "grpo"
    if command == "sweep":
        shutil.copy(REPO / "configs" / "glance_grpo.toml", tmp_path)
    elif "model = " not in block.partition("[")[0]:
        block = f'model = "glance-sft"\noutput = "runs/mine"\nsteps = 1\n{block}'
        block += "" if "[data]" in block else "[data.glance]\n"
    (tmp_path / "shown.toml").write_text(block)
    status = main([command, str(tmp_path / "shown.toml"), "--dry-run"])
    said, wrong = capsys.readouterr()
    assert said and status == (2 if "# MISSING: " in said else 0), wrong
