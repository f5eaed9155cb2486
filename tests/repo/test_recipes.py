"""The recipes of examples/recipes: what can be read of them without such machines."""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
SCRIPTS = sorted([*RECIPES.glob("*.sh"), *RECIPES.glob("*.sbatch")])
EXPLAINED = (RECIPES / "README.md").read_text()
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def commands(path: Path) -> str:
    """Without comments; lines that go on are joined."""
    text = path.read_text().replace("\\\n", " ")
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def flags_of_vtengine() -> set[str]:
    from vtengine.cli.arguments import build_parser

    parsers = [build_parser()]
    found: set[str] = set()
    for parser in parsers:
        for action in parser._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return found


def test_every_file_is_in_the_table() -> None:
    for path in RECIPES.iterdir():
        assert path.name == "README.md" or path.name.startswith("__") or f"`{path.name}`" in EXPLAINED


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [*SCRIPTS, RECIPES / "kubernetes.yaml"], ids=lambda path: path.name)
def test_every_flag_is_explained(path: Path) -> None:
    unexplained = {flag for flag in FLAG.findall(commands(path)) if f"{flag}" not in EXPLAINED}
    assert not unexplained


@pytest.mark.parametrize("path", [*SCRIPTS, RECIPES / "kubernetes.yaml"], ids=lambda path: path.name)
def test_flags_of_our_commands_exist(path: Path) -> None:
    known = flags_of_vtengine()
    for call in re.findall(r"^\s*vtengine (?:generate|serve|ask)[^\n]*", commands(path), re.MULTILINE):
        assert set(FLAG.findall(call)) <= known, call
    if path.suffix == ".yaml":
        for container in containers():
            if container["command"][0] == "vtengine":
                assert {argument.split("=")[0] for argument in container["args"]} <= known


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_configs_load(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vtengine_training.cli import main

    assert main(["grpo", str(path), "--dry-run"]) == 0
    assert "Plan" in capsys.readouterr().out


def containers() -> list[dict]:
    yaml = pytest.importorskip("yaml")
    found = []
    for document in yaml.safe_load_all((RECIPES / "kubernetes.yaml").read_text()):
        assert {"apiVersion", "kind", "metadata", "spec"} <= set(document)
        if document["kind"] == "Service":
            continue
        template = document["spec"]["template"]
        labels = template["metadata"]["labels"]
        assert document["spec"]["selector"]["matchLabels"] == labels
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            found.append(container)
    return found


def test_the_manifests_fit_together() -> None:
    sglang, vtengine = containers()
    addresses = next(a for a in vtengine["args"] if a.startswith("--backend=")).split("=", 1)[1].split(",")
    from vtengine.engine.sglang import addresses as parse

    assert parse(",".join(addresses)) == [f"http://sglang-{k}.sglang:30000" for k in range(4)]
    assert "--port=30000" in sglang["args"] and sglang["ports"] == [{"containerPort": 30000}]


@pytest.mark.sglang
def test_flags_of_sglang_exist() -> None:
    """In the environment of `make test-sglang`."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    for path in SCRIPTS:
        for call in re.findall(r"sglang\.launch_server[^\n&]*", commands(path)):
            assert set(FLAG.findall(call)) <= known, path
    for container in containers():
        if "sglang.launch_server" in container["command"]:
            assert {argument.split("=")[0] for argument in container["args"]} <= known


def test_the_pipeline_of_ray_data_uses_our_stage() -> None:
    code = (RECIPES / "ray_data.py").read_text()
    compile(code, "ray_data.py", "exec")
    assert "map_batches(\n        AnswerBatches" in code
