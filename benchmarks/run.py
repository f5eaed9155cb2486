"""The one benchmark runner: `python benchmarks/run.py --suite NAME [--quick] [--json OUT]`.

A suite is a file `benchmarks/suites/NAME.py` with `run(context)`, which gives rows (dicts), and, when wanted,

    TESTS = ["tests/..."]     must pass first: no number is written for code whose tests are red
    TABLES = {"marker": {"columns": {"row key": "heading"}, "where": {"row key": value}}}     read by report.py
    def plot(rows, path)      draws `results/NAME.svg`
    def data(rows)            {a file of the product: what it is to hold}; written by report.py

Results are `{"suite", "stamp": {commit, dirty, machine, versions, date}, "quick", "tables", "data", "rows"}`. A quick
run shrinks the work, checks nothing and writes only where `--json` says, so that no published table comes from it. Rows
of a suite that fails on the way are kept, if it yields them one by one: in `NAME.json.partial`, which nothing reads.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUITES = ROOT / "benchmarks" / "suites"
RESULTS = ROOT / "benchmarks" / "results"

for _folder in ("training", "kernels", ".", "benchmarks"):
    sys.path.insert(0, str(ROOT / _folder))

from measure import Context  # noqa: E402  (beside this file)

from vtengine.stamp import stamp  # noqa: E402


class NoSuchSuite(ValueError):
    """No file of this name is in benchmarks/suites."""


def suites() -> list[str]:
    """Names of all suites, sorted."""
    return sorted(path.stem for path in SUITES.glob("[a-z]*.py"))


def load_suite(name: str) -> ModuleType:
    """The suite as a module. NoSuchSuite: there is none of this name."""
    path = SUITES / f"{name}.py"
    if name not in suites():
        raise NoSuchSuite(f"suite = {name!r}: no such suite; there are: {', '.join(suites()) or 'none'}")
    spec = importlib.util.spec_from_file_location(f"benchmark_suite_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def gate(tests: list[str]) -> bool:
    """Whether the suite's own tests pass."""
    if not tests:
        return True
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    print("gate:", " ".join(command[2:]), file=sys.stderr)
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def run_suite(name: str, *, quick: bool = False, gated: bool = True) -> dict[str, Any]:
    """Runs one suite and returns the result document, with "failed" in it if that ended early. RuntimeError: its tests
    are red. What the suite raises before its first row is passed on."""
    module = load_suite(name)
    if gated and not quick and not gate(list(getattr(module, "TESTS", []))):
        raise RuntimeError(f"suite {name}: its tests fail, so no number is written")
    before = stamp(ROOT, untracked=True)
    found = {"suite": name, "stamp": before, "quick": quick, "tables": getattr(module, "TABLES", {})}
    rows: list[dict[str, Any]] = []
    try:
        for row in module.run(Context(quick=quick, results=RESULTS)):
            rows.append(row)
    except (Exception, KeyboardInterrupt) as error:
        if not rows:
            raise
        traceback.print_exc()
        return found | {"data": {}, "rows": rows, "failed": repr(error)}
    return found | {"data": module.data(rows) if hasattr(module, "data") else {}, "rows": rows}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as aligned columns."""
    keys = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], (list, dict))))
    cells = [keys] + [[_cell(row.get(key, "")) for key in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print("wrote", path, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description="Run one benchmark suite.")
    parser.add_argument("--suite", help="name of a file in benchmarks/suites")
    parser.add_argument("--quick", action="store_true", help="little work, no gate; written only where --json says")
    parser.add_argument("--json", type=Path, help="where to write (default: benchmarks/results/SUITE.json)")
    parser.add_argument("--no-gate", action="store_true", help="do not run the suite's tests first")
    parser.add_argument("--list", action="store_true", help="list the suites and stop")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(suites()))
        return 0
    if args.suite is None:
        parser.error(f"--suite is needed; there are: {', '.join(suites()) or 'none'}")
    try:
        result = run_suite(args.suite, quick=args.quick, gated=not args.no_gate)
    except NoSuchSuite as error:
        parser.error(str(error))
    except (RuntimeError, ValueError) as error:  # not a fault of the command line
        print("error:", error, file=sys.stderr)
        return 1
    show(result["rows"])
    target = args.json or (None if args.quick else RESULTS / f"{args.suite}.json")
    if "failed" in result:
        if target is not None:
            write(result, target.with_name(f"{target.name}.partial"))
        return 1
    if target is not None:
        write(result, target)
        plot = getattr(load_suite(args.suite), "plot", None)
        if plot is not None:
            plot(result["rows"], target.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
