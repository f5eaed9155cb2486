"""Every configuration and every profile that is shipped loads."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PROFILES = sorted((REPO / "vtengine" / "protocol" / "profiles").glob("*.toml"))
CONFIGS = sorted(path for folder in ("configs", "examples") for path in (REPO / folder).rglob("*.toml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profile(path: Path) -> None:
    from vtengine.protocol.profile import load_profile

    assert load_profile(path.stem) == load_profile(path)


def test_the_named_profiles_exist() -> None:
    assert {"vtengine", "visionthink", "glance"} <= {path.stem for path in PROFILES}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_is_toml(path: Path) -> None:
    assert tomllib.loads(path.read_text(encoding="utf-8"))
