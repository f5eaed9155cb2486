"""The shape of the tree: project folders, import floors, names."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LONGEST_FIRST

PROJECT_FOLDERS = ("kernels", "training", "benchmarks", "tests")
STANDARD_LIBRARY_ONLY = ("vtengine/protocol", "vtengine/config.py", "vtengine/vision/plan.py")
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "base_manager"}
PACKAGES = ("vtengine", "kernels/vtengine_kernels", "training/vtengine_training")


def python_files(repo_root: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((repo_root / folder).rglob("*.py"))]


def test_project_folders_are_not_packages(repo_root: Path) -> None:
    """A root package called `kernels` would shadow the one that transformers imports."""
    assert [name for name in PROJECT_FOLDERS if (repo_root / name / "__init__.py").exists()] == []


def test_the_other_package_called_kernels_stays_importable() -> None:
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        pytest.skip("no package called kernels is installed")
    assert "site-packages" in spec.origin or "dist-packages" in spec.origin


def test_imports_point_down(repo_root: Path) -> None:
    """import-linter keeps the contracts in pyproject.toml."""
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    program = "from importlinter.cli import lint_imports_command as main; main()"
    folders = os.pathsep.join(str(repo_root / name) for name in (".", "kernels", "training"))
    done = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_floor_one_uses_the_standard_library_only(repo_root: Path) -> None:
    allowed = sys.stdlib_module_names | {"vtengine"}
    found = [
        f"{path.relative_to(repo_root)}: {name}"
        for folder in STANDARD_LIBRARY_ONLY
        for path in (sorted((repo_root / folder).rglob("*.py")) or [repo_root / folder])
        if path.is_file()
        for name in imported_roots(path)
        if name not in allowed
    ]
    assert found == []


def imported_roots(path: Path) -> set[str]:
    """First names of everything a file imports, lazily too, but not for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("caller", ["vtengine/rollout", "vtengine/server"])
def test_callers_know_no_engine_by_name(repo_root: Path, caller: str) -> None:
    """rollout and server take a Backend; which one it is, the command line decides."""
    allowed = {"vtengine.engine.base", "vtengine.engine"}
    found = []
    for path in python_files(repo_root, caller):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "vtengine.engine":
                modules = [f"vtengine.engine.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            bad = [m for m in modules if m.startswith("vtengine.engine") and m not in allowed]
            found += [f"{path.relative_to(repo_root)}:{node.lineno}: {name}" for name in bad]
    assert found == []


def test_no_drawer_modules(repo_root: Path) -> None:
    """A module is named after what it holds."""
    files = python_files(repo_root, *PACKAGES, "benchmarks", "tests", "examples")
    assert [str(p.relative_to(repo_root)) for p in files if p.stem in FORBIDDEN_NAMES] == []


def test_the_long_test_files_are_there(repo_root: Path) -> None:
    """A file that was renamed would be begun last again."""
    assert [file for file in LONGEST_FIRST if not (repo_root / file).is_file()] == []


def test_no_manager_classes(repo_root: Path) -> None:
    found = [
        f"{path.relative_to(repo_root)}: {node.name}"
        for path in python_files(repo_root, *PACKAGES)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Manager", "Helper", "Util", "Utils"))
    ]
    assert found == []


def test_no_pickle_and_no_eval(repo_root: Path) -> None:
    """Neither a checkpoint nor a configuration may run code."""
    found = []
    for path in python_files(repo_root, *PACKAGES):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            builtin_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if builtin_call and node.func.id in {"eval", "exec"}:
                found.append(f"{path.relative_to(repo_root)}:{node.lineno}: {node.func.id}()")
        found += [
            f"{path.relative_to(repo_root)}: import {m}" for m in imported_roots(path) & {"pickle", "dill", "marshal"}
        ]
    assert found == []
