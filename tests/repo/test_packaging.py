"""The wheel of this tree, in a fresh environment, works away from the tree; its sdist holds all of its sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGES = {"vtengine", "vtengine_kernels", "vtengine_training"}
SKIPPED = {".git", "build", "dist", "out", "runs", "__pycache__", "tests", "docs"}


@dataclass(frozen=True)
class Installed:
    tree: Path
    wheel: Path
    folder: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A program of the fresh environment, started outside the tree."""
        environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
        program = str(self.folder / "bin" / command[0])
        return subprocess.run(
            [program, *command[1:]], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )


def call(*command: object, **environment: str) -> None:
    done = subprocess.run(
        [str(part) for part in command], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def installed(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Its library is not optimised, which would take a minute and is no matter of packaging."""
    root = tmp_path_factory.mktemp("packaging")
    compiler = root / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    compiler.chmod(0o755)
    return install(repo_root, root, CC=str(compiler), CXX=str(compiler))


@pytest.fixture(scope="module")
def without_compiler(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(repo_root, tmp_path_factory.mktemp("no-compiler"), CC="false", CXX="false")


def install(repo_root: Path, root: Path, **environment: str) -> Installed:
    """The wheel of a copy of the tree, in an environment that sees this one's dependencies but not its vtengine."""
    copy = root / "tree"
    shutil.copytree(repo_root, copy, ignore=lambda _folder, names: (SKIPPED & set(names)) | unwanted(names))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    call(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", root / "dist", copy, **environment)
    (wheel,) = (root / "dist").glob("vtengine-*.whl")

    fresh = root / "fresh"
    venv.create(fresh, with_pip=False, symlinks=True)
    call(*pip, "--python", fresh / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    (site,) = (fresh / "lib").glob("python*/site-packages")
    # Plain path entries: the nested .pth files of this environment (its editable vtengine) are not read.
    dependencies = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n", encoding="utf-8")
    return Installed(copy, wheel, fresh)


def unwanted(names: list[str]) -> set[str]:
    return {name for name in names if name.startswith(".venv") or name.endswith((".so", ".egg-info", ".pyc", "_cache"))}


def test_wheel_holds_the_three_packages_and_nothing_else(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        roots = {name.partition("/")[0] for name in archive.namelist()}
    assert {root for root in roots if not root.endswith(".dist-info")} == PACKAGES


def test_wheel_holds_every_data_file(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        held = set(archive.namelist())
    folders = {"": "vtengine", "kernels": "vtengine_kernels", "training": "vtengine_training"}
    wanted = {
        str(path.relative_to(installed.tree / base))
        for base, package in folders.items()
        for path in sources(installed.tree / base / package)
    }
    assert wanted - held == set()


def test_sdist_holds_all_that_a_wheel_is_built_from(installed: Installed, tmp_path: Path) -> None:
    code = "import os, sys; os.chdir(sys.argv[1]); from setuptools.build_meta import build_sdist as b; b(sys.argv[2])"
    call(sys.executable, "-c", code, installed.tree, tmp_path)
    (path,) = tmp_path.glob("vtengine-*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc", "vtengine", "kernels/vtengine_kernels", "training/vtengine_training")
    wanted = {str(path.relative_to(installed.tree)) for base in folders for path in sources(installed.tree / base)}
    assert (wanted | {"setup.py", "pyproject.toml", "LICENSE", "CHANGELOG.md"}) - held == set()


def sources(folder: Path) -> list[Path]:
    """Files of the project in a folder of the tree."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not unwanted([path.name]) and path.name[0] != "."
    ]


def test_packages_import_from_the_wheel(installed: Installed) -> None:
    code = f"import {', '.join(sorted(PACKAGES))}; print(*[m.__file__ for m in ({', '.join(sorted(PACKAGES))})])"
    done = installed.run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(str(installed.folder) in path for path in done.stdout.split())


@pytest.mark.parametrize("program", ["vtengine", "vtengine-train"])
def test_programs_answer_help(installed: Installed, program: str) -> None:
    done = installed.run(program, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_profiles_load_from_the_wheel(installed: Installed) -> None:
    code = (
        "from vtengine.protocol.profile import load_profile as l; [l(n) for n in ('vtengine', 'visionthink', 'glance')]"
    )
    done = installed.run("python", "-c", code)
    assert done.returncode == 0, done.stderr


def test_version_is_that_of_the_metadata(installed: Installed) -> None:
    code = "import vtengine, importlib.metadata as m; assert vtengine.__version__ == m.version('vtengine')"
    done = installed.run("python", "-c", code)
    assert done.returncode == 0, done.stderr


def test_doctor_runs_from_the_wheel(installed: Installed) -> None:
    done = installed.run("vtengine", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_compiler_it_installs_and_says_what_is_slower(without_compiler: Installed) -> None:
    with zipfile.ZipFile(without_compiler.wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    done = without_compiler.run("vtengine", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "slower" in done.stdout and "g++" in done.stdout, done.stdout
