"""The commands, their flags, choices and defaults are frozen: scripts of others rely on them.

After an intended change: `VTENGINE_UPDATE_GOLDEN=1 pytest tests/repo/test_cli_surface.py`, then read the difference.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("cli_surface")
PROGRAMS = {"vtengine": "vtengine.cli.arguments", "vtengine-train": "vtengine_training.cli"}


def surface(parser: argparse.ArgumentParser, command: str) -> Iterator[str]:
    """One line per argument of the command and of its subcommands."""
    yield command
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from surface(child, f"{command} {name}")
        elif not isinstance(action, argparse._HelpAction):
            yield f"  {describe(action)}"


def describe(action: argparse.Action) -> str:
    name = " ".join(action.option_strings) or action.metavar or action.dest
    value = "" if action.nargs == 0 or not action.option_strings else f" {value_name(action)}"
    facts = []
    if action.required and action.option_strings:
        facts.append("required")
    if action.nargs not in (None, 0):
        facts.append(f"nargs {action.nargs}")
    if action.default is not None and action.default is not False and action.default != argparse.SUPPRESS:
        facts.append(f"default {action.default}")
    return f"{name}{value}" + (f"    ({', '.join(facts)})" if facts else "")


def value_name(action: argparse.Action) -> str:
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper())


@pytest.mark.parametrize("program", PROGRAMS)
def test_surface_is_frozen(program: str) -> None:
    parser = importlib.import_module(PROGRAMS[program]).build_parser()
    lines = "\n".join(surface(parser, program)) + "\n"
    golden = GOLDEN / f"{program}.txt"
    if os.environ.get("VTENGINE_UPDATE_GOLDEN") == "1":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(lines, encoding="utf-8")
    assert lines == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["generate", "ask", "serve", "view", "bench", "doctor"])
def test_the_public_commands_are_there(command: str) -> None:
    assert f"vtengine {command}\n" in (GOLDEN / "vtengine.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["sft", "grpo", "eval", "curate", "judge-check", "sweep"])
def test_every_training_command_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from vtengine_training.cli import main

    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"examples:\n  vtengine-train {command} " in said


PUBLIC_FLAGS = "--model --backend --resolution --max-turns --n --temperature --seed --image-root --concurrency --resume"


@pytest.mark.parametrize("flag", PUBLIC_FLAGS.split())
def test_the_public_flags_of_generate_are_there(flag: str) -> None:
    text = (GOLDEN / "vtengine.txt").read_text(encoding="utf-8")
    section = text.split("vtengine generate\n")[1].split("\nvtengine ")[0]
    assert any(line.split()[0] == flag for line in section.splitlines())
