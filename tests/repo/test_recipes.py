"""The recipes of examples/recipes: what can be read of them without such machines."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
SCRIPTS = sorted([*RECIPES.glob("*.sh"), *RECIPES.glob("*.sbatch")])
MANIFESTS = sorted(RECIPES.glob("*.yaml"))
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


@pytest.mark.parametrize("path", [*SCRIPTS, *MANIFESTS], ids=lambda path: path.name)
def test_every_flag_is_explained(path: Path) -> None:
    unexplained = {flag for flag in FLAG.findall(commands(path)) if f"{flag}" not in EXPLAINED}
    assert not unexplained


@pytest.mark.parametrize("path", [*SCRIPTS, *MANIFESTS], ids=lambda path: path.name)
def test_flags_of_our_commands_exist(path: Path) -> None:
    known = flags_of_vtengine()
    for call in re.findall(r"^\s*vtengine (?:generate|serve|ask)[^\n]*", commands(path), re.MULTILINE):
        assert set(FLAG.findall(call)) <= known, call
    if path.suffix == ".yaml":
        for container in containers(path):
            if container["command"][0] == "vtengine":
                assert {argument.split("=")[0] for argument in container["args"]} <= known


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_configs_load(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vtengine_training.cli import main

    assert main(["grpo", str(path), "--dry-run"]) == 2  # weights and data are the reader's
    said = capsys.readouterr()
    assert "# Plan" in said.out and "# MISSING: " in said.out and f"{path}: would not start: " in said.err


def containers(path: Path) -> list[dict]:
    yaml = pytest.importorskip("yaml")
    found = []
    for document in yaml.safe_load_all(path.read_text()):
        assert {"apiVersion", "kind", "metadata", "spec"} <= set(document)
        if document["kind"] == "Service":
            continue
        template = document["spec"]["template"]
        labels = template["metadata"]["labels"]
        assert document["kind"] == "Job" or document["spec"]["selector"]["matchLabels"] == labels
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            found.append(container)
    return found


@pytest.mark.parametrize(
    ("name", "flag", "servers"),
    [("kubernetes", "--backend=", "sglang"), ("kubernetes_grpo", "--set=rollout.backend=", "rollouts")],
)
def test_the_manifests_fit_together(name: str, flag: str, servers: str) -> None:
    sglang, client = containers(RECIPES / f"{name}.yaml")
    addresses = next(a for a in client["args"] if a.startswith(flag)).removeprefix(flag).split(",")
    from vtengine.engine.sglang import addresses as parse

    assert parse(",".join(addresses)) == [f"http://{servers}-{k}.{servers}:30000" for k in range(4)]
    assert "--port=30000" in sglang["args"] and sglang["ports"] == [{"containerPort": 30000}]


def overrides(text: str) -> list[str]:
    return [word.strip("\"'") for word in re.findall(r"--set[ =](\S+=)", text)]


@pytest.mark.parametrize("path", [RECIPES / "slurm_grpo.sbatch", RECIPES / "kubernetes_grpo.yaml"])
def test_what_they_set_is_in_the_configuration(path: Path) -> None:
    from vtengine_training.trainer.config import GrpoConfig

    from vtengine.config import load_config

    values = {"rollout.backend": "http://a:1,http://b:1", "rollout.concurrency": "128", "update.shard_ranks": "8"}
    keys = [key.removesuffix("=") for key in overrides(commands(path))]
    assert {"model", "output", "rollout.backend", "rollout.sync_address"} <= set(keys)
    load_config(GrpoConfig, RECIPES / "node_8gpu_grpo.toml", [f"{key}={values.get(key, 'x')}" for key in keys])


def test_flags_of_torchrun_exist() -> None:
    from torch.distributed.run import get_args_parser

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    calls = [re.search(r"torchrun(.*?) -m ", commands(RECIPES / "node_8gpu_grpo.sh"))[1].split()]
    calls.append(containers(RECIPES / "kubernetes_grpo.yaml")[1]["args"])
    for call in calls:
        ours = [word.split("=")[0] for word in call if word.startswith("--") and not word.startswith("--set=")]
        assert "--nproc-per-node" in ours and set(ours) <= known


STUBS = {
    "curl": "true",
    "openssl": "true",
    # a server: says when it is stopped
    "python": "trap 'echo server stopped >> $LOG; exit 0' TERM; while :; do sleep .02; done",
    # the trainer: TERM finishes its step; then the servers must still be there
    "trainer": "trap 'sleep .3; echo saved >> $LOG; exit 75' TERM; echo training >> $LOG; while :; do sleep .02; done",
    "torchrun": 'exec trainer "$@"',
    "vtengine-train": 'exec trainer "$@"',
    "srun": "while [[ $1 == --* ]]; do case $1 in --job-name=*) name=${1#*=};; esac; shift; done\n"
    'echo $$ > "$(dirname $LOG)/$name.pid"; export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=8; exec "$@"',
    "squeue": "printf '7.0 serve\\n7.1 train\\n'",
    "scancel": '[ "$*" = "--signal=TERM 7.1" ] && kill -TERM "$(cat "$(dirname $LOG)/train.pid")"',
    "scontrol": 'if [ "$1" = show ]; then printf "n0\\nn1\\nn2\\n"; else echo "$*" >> $LOG; fi',
}
"""What the scripts call, in small."""


TERM_BEFORE_IT_HAS_A_NAME = r"""
early() { until grep -q training $LOG; do sleep .02; done; kill -TERM $$; }
trap '[[ $BASH_COMMAND != "trainer=\$!" ]] || early' DEBUG
"""
"""The trainer runs, and the script does not know its number yet."""


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("name", "servers"), [("node_8gpu_grpo.sh", 4), ("slurm_grpo.sbatch", 1)])
def test_term_ends_the_trainer_first(name: str, servers: int, early: bool, tmp_path: Path) -> None:
    """The step is finished and saved while the servers live; then they are stopped; the status is the trainer's."""
    log = tmp_path / "log"
    log.write_text("")
    for stub, code in STUBS.items():
        (tmp_path / stub).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / stub).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "MODEL": "/models/m"}
    environment |= {"SLURM_SUBMIT_DIR": str(RECIPES), "SLURM_JOB_NODELIST": "n[0-2]", "SLURM_JOB_ID": "7"}
    if early:
        (tmp_path / "early").write_text(TERM_BEFORE_IT_HAS_A_NAME)
        environment["BASH_ENV"] = str(tmp_path / "early")
    with subprocess.Popen(["bash", str(RECIPES / name)], env=environment, cwd=tmp_path) as script:
        until = time.monotonic() + 60
        while "training" not in log.read_text() and time.monotonic() < until:
            time.sleep(0.02)
        if not early:
            time.sleep(0.1)
            script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=60) == 75
    requeued = ["requeue 7"] if name.startswith("slurm") else []
    assert log.read_text().splitlines() == ["training", "saved", *["server stopped"] * servers, *requeued]


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
    for container in [one for path in MANIFESTS for one in containers(path)]:
        if "sglang.launch_server" in container["command"]:
            assert {argument.split("=")[0] for argument in container["args"]} <= known


def test_the_pipeline_of_ray_data_uses_our_stage() -> None:
    code = (RECIPES / "ray_data.py").read_text()
    compile(code, "ray_data.py", "exec")
    assert "map_batches(\n        AnswerBatches" in code
