"""`vtengine bench`: runs a suite of the source checkout's `benchmarks/` folder."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

import vtengine
from vtengine.cli.errors import OK, UsageError
from vtengine.config import did_you_mean


def run(arguments: argparse.Namespace) -> int:
    """Runs `benchmarks/run.py --suite SUITE` and returns its status. Raises UsageError."""
    folder = Path(vtengine.__file__).resolve().parents[1] / "benchmarks"
    if not (folder / "run.py").is_file():
        raise UsageError(
            "bench: the benchmarks are in the source repository, not in the package; run it from a checkout"
        )
    suites = sorted(path.stem for path in (folder / "suites").glob("[a-z]*.py"))
    if arguments.list:
        width = max(map(len, suites), default=0)
        print("\n".join(f"{name:{width}}  {_subject(folder / 'suites', name)}" for name in suites))
        return OK
    if arguments.suite not in suites:
        asked = "no SUITE is given" if arguments.suite is None else f"there is no suite {arguments.suite!r}"
        remedy = did_you_mean(arguments.suite or "", suites) or "`vtengine bench --list` names them"
        raise UsageError(f"bench: {asked}; {remedy}")
    command = [sys.executable, str(folder / "run.py"), "--suite", arguments.suite]
    return subprocess.run([*command, *(["--quick"] if arguments.quick else [])], check=False).returncode


def _subject(folder: Path, name: str) -> str:
    """What a suite measures: the first line of its docstring."""
    module = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(module) or "").partition("\n")[0]
