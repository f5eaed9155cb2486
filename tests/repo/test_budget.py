"""Sizes: a file that fits in the head, a function that fits on the screen."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

FOLDERS = ("vtengine", "kernels", "training", "benchmarks", "tests", "examples", "csrc")
MAX_FILE_LINES = 400
MAX_MEDIAN_FILE_LINES = 150
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120  # bodies of Triton kernels
MAX_MODEL_BYTES = 25_000_000
SUFFIXES = {".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h"}


def sources(repo_root: Path) -> list[Path]:
    return [
        path
        for folder in FOLDERS
        for path in sorted((repo_root / folder).rglob("*"))
        if path.suffix in SUFFIXES and path.is_file()
    ]


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files(repo_root: Path) -> None:
    sizes = {str(path.relative_to(repo_root)): num_lines(path) for path in sources(repo_root)}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_LINES} == {}


def test_median_file_of_the_packages(repo_root: Path) -> None:
    folders = [repo_root / folder for folder in FOLDERS[:3]]
    sizes = [num_lines(p) for p in sources(repo_root) if any(p.is_relative_to(f) for f in folders)]
    assert statistics.median(sizes) <= MAX_MEDIAN_FILE_LINES


def test_functions(repo_root: Path) -> None:
    """Length from the `def` line to the last; docstrings count."""
    found = {}
    for path in (p for p in sources(repo_root) if p.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > (MAX_KERNEL_LINES if is_kernel(node) else MAX_FUNCTION_LINES):
                    found[f"{path.relative_to(repo_root)}:{node.lineno} {node.name}"] = length
    assert found == {}


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(
        "triton" in ast.unparse(decorator) or "jit" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def test_shipped_assets(repo_root: Path) -> None:
    """Each shipped model with its tokenizer and processor files stays small enough for a source repository."""
    models = [folder for folder in (repo_root / "vtengine" / "assets").glob("*") if folder.is_dir()]
    sizes = {folder.name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in models}
    assert {name: size for name, size in sizes.items() if size > MAX_MODEL_BYTES} == {}
